"""What the generator role promises as a process of its own, whatever engine is below it: it adopts weights in flight, leaves
cleanly whatever ends it, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
import vllm_cases as cases
from test_generator_worker import Buffer, Worker

from engine.config import Config, parse_config
from engine.weights import Publisher, Terms
from protocols.messages import Rollout, Sampling, Ticket

START_S = 400.0
"""On a machine with other work; half a minute on an idle one."""


def make_config(folder: Path, engine: dict[str, object]) -> Config:
    """A run of the tiny model under `folder`, which lies ready."""
    data = {
        "name": "test", "runs": str(folder), "steps": 1, "tasks": [], "objective": {"type": "dapo"},
        "model": msgspec.to_builtins(cases.MODEL),
        "buffer": {"groups_per_step": 1}, "learner": {"lr": 1e-6, "peer_timeout_s": 10.0},
        "generator": {"sampling": {"max_tokens": 8}, "engine": engine, "device": "cpu"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(data))
    config = parse_config(data, "test")
    cases.make_folder(config.run_dir / "model")
    return config


def much_work() -> list[Ticket]:
    """More than any machine has done before a test has acted: slots are never free, and, as lengths differ, some responses
    are always under way."""
    tickets = []
    for group in range(1, 201):
        item = cases.ticket(group, 20, 4)
        sampling = Sampling(max_tokens=80 + 17 * (group % 5))
        tickets.append(Ticket(group, item.samples, group + 1, item.prompt, sampling, group))
    return tickets


class WorkerContract:
    """For a class of tests beside a fixture `config` (of `make_config`)."""

    lost: str
    """What the role says when its engine has died."""

    processes: Callable[[int], list[int]]
    """Those of the engine that a role has started, by its pid; the first can be killed to lose the engine."""

    @pytest.fixture
    def buffer(self) -> Iterator[Buffer]:
        found = Buffer()
        with closing(found.server):
            yield found

    @pytest.fixture
    def learner(self) -> Iterator[Publisher]:
        with Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=10.0)) as publisher:
            yield publisher

    def test_it_adopts_weights_in_flight_and_hands_back_when_told_to_leave(
        self, config: Config, buffer: Buffer, learner: Publisher
    ) -> None:
        model, work = config.run_dir / "model", much_work()
        with Worker(config, buffer.server.address, "g") as worker:
            buffer.until(lambda: "g" in buffer.hellos, START_S)
            learner.publish(4, cases.weights(model, 4))
            buffer.announce(learner)
            buffer.send("g", *work)
            buffer.until(lambda: buffer.tokens("g") > 60)
            learner.publish(5, cases.weights(model, 5))
            buffer.until(lambda: len(of_versions(buffer, [4, 5])) >= 2 and of_versions(buffer, [5]))
            check_rollouts(model, work, of_versions(buffer, [4, 5])[:6] + of_versions(buffer, [5])[:2])
            below = self.processes(worker.process.pid)
            assert below
            worker.process.send_signal(signal.SIGTERM)
            buffer.until(lambda: "g" in buffer.left)
            assert worker.ended()[0] == 0
            check_nothing_is_lost(buffer, work)
            cases.none_alive(below)

    def test_a_dead_engine_leaves_cleanly_and_a_dead_generator_leaves_no_engine(
        self, config: Config, buffer: Buffer, learner: Publisher
    ) -> None:
        learner.publish(4, cases.weights(config.run_dir / "model", 4))
        buffer.announce(learner)
        work = much_work()
        with (
            Worker(config, buffer.server.address, "engine") as first,
            Worker(config, buffer.server.address, "generator") as second,
        ):
            buffer.until(lambda: len(buffer.hellos) == 2, START_S)
            engine, orphans = self.processes(first.process.pid), self.processes(second.process.pid)
            assert orphans
            buffer.send("engine", *work)
            buffer.until(lambda: buffer.tokens("engine") > 40)
            os.kill(engine[0], signal.SIGKILL)
            buffer.until(lambda: "engine" in buffer.left, 20.0)
            code, errors = first.ended()
            assert code == 1
            assert f"engine: {self.lost}" in errors
            check_nothing_is_lost(buffer, work)
            cases.none_alive(engine)
            buffer.send("generator", *work)
            buffer.until(lambda: buffer.tokens("generator") > 40)
            second.process.kill()
            cases.none_alive(orphans)


def of_versions(buffer: Buffer, versions: list[int]) -> list[Rollout]:
    return [rollout for rollout in buffer.rollouts.values() if [each for each, _ in rollout.versions] == versions]


def check_rollouts(model: Path, work: list[Ticket], rollouts: list[Rollout]) -> None:
    """What a rollout says of its first version's tokens is what the weights of that version give."""
    for rollout in rollouts:
        version, made = rollout.versions[0]
        item = work[rollout.group - 1]
        expected = cases.fresh_logprobs(model, cases.weights(model, version), item, rollout.tokens)
        np.testing.assert_allclose(rollout.logprobs[:made], expected[:made], atol=1e-4)


def check_nothing_is_lost(buffer: Buffer, work: list[Ticket]) -> None:
    """Every sample has either come as a rollout or been handed back, those under way with their tokens."""
    handed = [(each.group, sample) for each in buffer.handed for sample in each.samples]
    assert sorted([*buffer.rollouts, *handed]) == [(item.group, sample) for item in work for sample in item.samples]
    partials = [partial for each in buffer.handed for partial in each.partials]
    assert partials
    assert all(len(partial.tokens) for partial in partials)
