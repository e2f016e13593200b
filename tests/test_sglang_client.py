"""The SGLang generator against a server that speaks SGLang's interface: what every engine promises, and the server's own life."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sglang_cases
import vllm_cases as cases
from engine_contract import EngineContract
from vllm_cases import finish, fresh_logprobs, ticket, weights

from engine.config import SglangEngine
from engine.generate_engine import EngineGenerator
from engine.generate_sglang_http import Api
from engine.generate_sglang_server import free_port
from engine.generate_sglang_weights import WeightGroup


def start(folder: Path, mode: str) -> EngineGenerator:
    """One on each of the two protocols, the other one with tokens three at a time."""
    other: dict[str, object] = {} if mode == "keep" else {"version": "0.5.23", "stream_interval": 3}
    return sglang_cases.start(folder, sglang_cases.engine(folder.parent, on_new_weights=mode, **other))


class TestClient(EngineContract):
    start = staticmethod(start)
    long, stepped = 150, False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.make_folder(tmp_path_factory.mktemp("sglang") / "model")


def test_a_server_given_by_its_address_outlives_its_generators(model: Path) -> None:
    port = free_port()
    arguments = {
        "model-path": model, "host": "127.0.0.1", "port": port, "dtype": "float32", "tp-size": 1, "context-length": 512,
        "stream-interval": 1, "version": "0.5.23",
    }  # fmt: skip
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    command = [sglang_cases.interpreter(model.parent), sglang_cases.FAKE, *flags, "--session"]
    server = subprocess.Popen([*command, "--disable-overlap-schedule"])
    config = SglangEngine(slots=4, address=f"http://127.0.0.1:{port}", start_s=60.0, deadline_s=20.0)
    try:
        for version in (1, 2):  # the second takes the weights' group over
            generator = sglang_cases.start(model, config)
            new, item = weights(model, version), ticket(1, 5, 2, max_tokens=5)
            generator.load(new, version)
            generator.add(item)
            for (_, _), rollout in finish(generator).items():
                expected = fresh_logprobs(model, new, item, rollout.tokens)
                np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)
            generator.close()
            assert server.poll() is None
        check_buckets(Api(config.address or "", deadline_s=20.0), weights(model, 3))
    finally:
        server.kill()
        server.wait(20)


def check_buckets(api: Api, new: cases.Weights) -> None:
    """Weights that do not fit into one request are sent with several, and count as new with the last of them."""
    group = WeightGroup(api, ranks=1, timeout_s=20.0, bucket_bytes=1000)
    api.post("/begin_weight_update", {})
    group.send(new, "3")
    api.post("/end_weight_update", {})
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        if name in new:
            read = api.post("/get_weights_by_name", {"name": name, "truncate_size": 2})["value"]
            np.testing.assert_array_equal(np.array(read), new[name][:2].numpy())
    group.close()
    api.close()


def test_a_leash_ends_a_command_and_its_children_with_the_process_that_holds_it() -> None:
    """The holder is killed; the command's child has left a trace of its pid."""
    leash = str(sglang_cases.ROOT / "engine/leash.py")
    code = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-I', '-S', {leash!r}, str(os.getpid()), 'sh', '-c', "
        "'sleep 600 & sleep 600'], start_new_session=True)\n"
        "print('started', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "started\n"
    deadline = time.monotonic() + 20
    while len(below := sglang_cases.children(holder.pid)) < 4:  # leash, shell, two sleeps
        assert time.monotonic() < deadline
    holder.kill()
    holder.wait(20)
    cases.none_alive(below)
