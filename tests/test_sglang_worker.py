"""The generator role on an SGLang server (that of the tests): it leaves cleanly whatever ends it, and leaves no server behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
import sglang_cases
import vllm_cases as cases
from sglang_cases import children
from test_generator_worker import Buffer, Worker

from engine.config import Config, parse_config
from engine.weights import Publisher
from protocols.messages import Sampling, Ticket

START_S = 120.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("runs")
    engine = msgspec.to_builtins(sglang_cases.engine(folder))
    data = {
        "name": "test", "runs": str(folder), "steps": 1, "tasks": [], "objective": {"type": "dapo"},
        "model": msgspec.to_builtins(cases.MODEL),
        "buffer": {"groups_per_step": 1}, "learner": {"lr": 1e-6, "peer_timeout_s": 10.0},
        "generator": {"sampling": {"max_tokens": 8}, "engine": engine, "device": "cpu"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data))
    found = parse_config(data, "test")
    cases.make_folder(found.run_dir / "model")
    return found


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    buffer = Buffer()
    yield buffer
    buffer.server.close()


@pytest.fixture
def learner(config: Config) -> Iterator[Publisher]:
    with Publisher("127.0.0.1", bucket_bytes=1 << 20, peer_timeout_s=10.0) as publisher:
        yield publisher


def long_ticket(group: int) -> Ticket:
    item = cases.ticket(group, 20, 4)
    return Ticket(group, item.samples, group + 1, item.prompt, Sampling(max_tokens=400), group)


def none_alive(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(cases.alive, processes)):
        assert time.monotonic() < deadline, processes
        time.sleep(0.05)


def test_it_adopts_weights_in_flight_and_hands_back_when_told_to_leave(
    config: Config, buffer: Buffer, learner: Publisher
) -> None:
    model = config.run_dir / "model"
    with Worker(config, buffer.server.address, "g") as worker:
        buffer.until(lambda: "g" in buffer.hellos, START_S)
        learner.publish(4, cases.weights(model, 4))
        buffer.announce(learner)
        item = long_ticket(1)
        buffer.send("g", item)
        buffer.until(lambda: buffer.tokens("g") > 40)
        learner.publish(5, cases.weights(model, 5))
        buffer.until(lambda: len(buffer.rollouts) == 4)
        for rollout in buffer.rollouts.values():
            assert [version for version, _ in rollout.versions] == [4, 5]
            made = rollout.versions[0][1]
            expected = cases.fresh_logprobs(model, cases.weights(model, 4), item, rollout.tokens)
            np.testing.assert_allclose(rollout.logprobs[:made], expected[:made], atol=1e-4)
        buffer.send("g", long_ticket(2))
        done = buffer.tokens("g")
        buffer.until(lambda: buffer.tokens("g") > done + 40)
        below = children(worker.process.pid)
        assert len(below) >= 2
        worker.process.send_signal(signal.SIGTERM)
        buffer.until(lambda: "g" in buffer.left)
        assert worker.ended()[0] == 0
        (handed,) = buffer.handed
        assert (handed.group, sorted(handed.samples), len(handed.partials)) == (2, [0, 1, 2, 3], 4)
        none_alive(below)


def test_a_dead_server_leaves_cleanly_and_a_dead_generator_leaves_no_server(
    config: Config, buffer: Buffer, learner: Publisher
) -> None:
    learner.publish(4, cases.weights(config.run_dir / "model", 4))
    buffer.announce(learner)
    with (
        Worker(config, buffer.server.address, "server") as first,
        Worker(config, buffer.server.address, "generator") as second,
    ):
        buffer.until(lambda: len(buffer.hellos) == 2, START_S)
        server, orphans = children(first.process.pid), children(second.process.pid)
        buffer.send("server", long_ticket(1))
        buffer.until(lambda: buffer.tokens("server") > 40)
        os.kill(server[-1], signal.SIGKILL)
        buffer.until(lambda: "server" in buffer.left, 10.0)
        code, errors = first.ended()
        assert code == 1
        assert "server: SGLang is lost: " in errors
        (handed,) = buffer.handed
        assert (handed.group, sorted(handed.samples), len(handed.partials)) == (1, [0, 1, 2, 3], 4)
        none_alive(server)
        buffer.send("generator", long_ticket(2))
        buffer.until(lambda: buffer.tokens("generator") > 40)
        second.process.kill()
        none_alive(orphans)
