"""The generator role on vLLM as a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_cases as cases
from test_generator_worker import Buffer, Worker
from worker_contract import START_S, WorkerContract, make_config

from engine.config import Config

pytestmark = [cases.needs_vllm, pytest.mark.timeout(900)]
ENGINE = {"type": "vllm", "slots": 8, "kv_gb": 0.25, "deadline_s": 20}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_config(tmp_path_factory.mktemp("runs"), ENGINE)


class TestWorker(WorkerContract):
    lost = "vLLM cannot"
    processes = staticmethod(cases.workers_of)

    def test_what_does_not_fit_ends_it_before_it_joins(self, tmp_path: Path, buffer: Buffer) -> None:
        config = make_config(tmp_path, ENGINE | {"tensor_parallel": 3})
        with Worker(config, buffer.server.address, "g") as worker:
            code, errors = worker.ended(START_S)
        assert code == 2
        assert "generator.engine.tensor_parallel = 3 does not divide the 2 attention heads of" in errors
        assert not buffer.hellos
