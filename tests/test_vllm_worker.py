"""The generator role on vLLM as a process of its own: it leaves cleanly whatever ends it, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import vllm_cases as cases
from test_generator_worker import Buffer, Worker

from engine.config import Config, parse_config
from engine.weights import Publisher
from protocols.messages import Sampling, Ticket

pytestmark = [cases.needs_vllm, pytest.mark.timeout(900)]
START_S = 400.0
"""On a machine with other work; half a minute on an idle one."""
ENGINE = {"type": "vllm", "slots": 8, "kv_gb": 0.25, "deadline_s": 20}


def make_config(folder: Path, **engine: object) -> Config:
    data = {
        "name": "test", "runs": str(folder), "steps": 1, "tasks": [], "objective": {"type": "dapo"},
        "model": msgspec.to_builtins(cases.MODEL),
        "buffer": {"groups_per_step": 1}, "learner": {"lr": 1e-6, "peer_timeout_s": 10.0},
        "generator": {"sampling": {"max_tokens": 8}, "engine": ENGINE | engine, "device": "cpu"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data))
    return parse_config(data, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    config = make_config(folder)
    cases.make_folder(config.run_dir / "model")
    return config


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
    item = cases.ticket(group, 40, 4)
    return Ticket(group, item.samples, group + 1, item.prompt, Sampling(max_tokens=400), group)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
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
        buffer.until(lambda: buffer.tokens("g") > 60)
        learner.publish(5, cases.weights(model, 5))
        buffer.until(lambda: len(buffer.rollouts) == 4)
        across = [r for r in buffer.rollouts.values() if [version for version, _ in r.versions] == [4, 5]]
        assert across
        for rollout in across:
            made, old = rollout.versions[0][1], cases.weights(model, 4)
            expected = cases.fresh_logprobs(model, old, item, rollout.tokens)
            np.testing.assert_allclose(rollout.logprobs[:made], expected[:made], atol=1e-4)
        buffer.send("g", long_ticket(2))
        done = buffer.tokens("g")
        buffer.until(lambda: buffer.tokens("g") > done + 40)
        children = cases.workers_of(worker.process.pid)
        assert children
        worker.process.send_signal(signal.SIGTERM)
        buffer.until(lambda: "g" in buffer.left)
        assert worker.ended()[0] == 0
        (handed,) = buffer.handed
        assert handed.group == 2
        assert set(handed.samples) | {sample for group, sample in buffer.rollouts if group == 2} == {0, 1, 2, 3}
        assert handed.partials
        assert not any(map(cases.alive, children))


def test_a_dead_engine_leaves_cleanly_and_a_dead_generator_leaves_no_engine(
    config: Config, buffer: Buffer, learner: Publisher
) -> None:
    learner.publish(4, cases.weights(config.run_dir / "model", 4))
    buffer.announce(learner)
    with (
        Worker(config, buffer.server.address, "engine") as first,
        Worker(config, buffer.server.address, "generator") as second,
    ):
        buffer.until(lambda: len(buffer.hellos) == 2, START_S)
        (engine, *_), orphans = cases.workers_of(first.process.pid), cases.workers_of(second.process.pid)
        buffer.send("engine", long_ticket(1))
        buffer.until(lambda: buffer.tokens("engine") > 40)
        os.kill(engine, signal.SIGKILL)
        buffer.until(lambda: "engine" in buffer.left, 10.0)
        code, errors = first.ended()
        assert code == 1
        assert "engine: vLLM cannot" in errors
        (handed,) = buffer.handed
        assert handed.group == 1
        assert set(handed.samples) | {sample for _, sample in buffer.rollouts} == {0, 1, 2, 3}
        assert handed.partials
        buffer.send("generator", long_ticket(2))
        buffer.until(lambda: buffer.tokens("generator") > 40)
        second.process.kill()
        until(lambda: not any(map(cases.alive, orphans)), 5.0)


def test_what_does_not_fit_ends_it_before_it_joins(folder: Path, config: Config, buffer: Buffer) -> None:
    other = folder / "other"
    other.mkdir()
    make_config(other, tensor_parallel=3)
    cases.make_folder(other / "test" / "model")
    with Worker(msgspec.structs.replace(config, runs=str(other)), buffer.server.address, "g") as worker:
        code, errors = worker.ended(START_S)
    assert code == 2
    assert "generator.engine.tensor_parallel = 3 does not divide the 2 attention heads of" in errors
    assert not buffer.hellos
