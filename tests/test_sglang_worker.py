"""The generator role on an SGLang server (that of the tests) as a process of its own."""

from __future__ import annotations

import msgspec
import pytest
import sglang_cases
from worker_contract import WorkerContract, make_config

from engine.config import Config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("runs")
    return make_config(folder, msgspec.to_builtins(sglang_cases.engine(folder)))


class TestWorker(WorkerContract):
    lost = "SGLang is lost: "
    processes = staticmethod(lambda parent: sglang_cases.children(parent)[::-1])  # the leash comes before its server
