"""Headrace's side of the rollout hop: the link and the log of the product, in three processes.

The producer sends a `Rollout` and a `Grade` for every response. The buffer does with them what the product's does: a row
each in the log (and one for the group and its prompt), a commit that is on disk (`synchronous = FULL`) before anything
is acknowledged, then the chunk that the consumer pulls, planned as a step and read back from the log. The consumer
makes tensors of the `Batch` and sends the `StepCommit` that marks its groups as trained. It asks two steps ahead.
Left out is the ledger, which decides who samples what. No torch here but in the consumer.
"""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from typing import Any

import numpy as np

from protocols.link import Client, Received, Server
from protocols.link_messages import Hello, Role
from protocols.log import GroupRow, Log
from protocols.messages import INT, Batch, Grade, Pull, Rollout, StepCommit
from tools.benchmarks.hop_rounds import POOL, RESPONSES, TIMEOUT_S, Pair, Response, Round, context, pool

PROMPT_TOKENS = 128
TURN_S = 0.02
PULLS_AHEAD = 2


class HeadraceHop:
    """The log is a new one in `folder`."""

    name = "Headrace"

    def __init__(self, folder: Path) -> None:
        ours, theirs = context.Pipe()
        self._end = ours
        self._buffer = context.Process(target=serve, args=(theirs, folder / "rollouts.db"), name="buffer", daemon=True)
        self._buffer.start()
        theirs.close()
        if not ours.poll(TIMEOUT_S):
            raise TimeoutError(f"hop: the buffer is not up within {TIMEOUT_S:.0f} s")
        self._pair = Pair(Producer, Consumer, ours.recv())

    @property
    def pids(self) -> list[int]:
        return [self.buffer_pid, *self._pair.pids]

    @property
    def buffer_pid(self) -> int:
        return self._buffer.pid or 0

    def ask(self, what: str, round: Round) -> float:
        return self._pair.ask(what, round)

    def close(self) -> None:
        self._pair.close()
        self._end.close()
        self._buffer.join(10)
        self._buffer.kill()


# --- buffer -----------------------------------------------------------------------------------------------------------


def serve(driver: Connection, path: Path) -> None:
    """The buffer's process, until the driver's end of the pipe is closed."""
    server = Server("tcp://127.0.0.1:0", heartbeat_s=1.0, peer_timeout_s=60.0)
    with Log.create(path, run="hop", config={}, code_version="") as log:
        buffer = Buffer(server, log)
        driver.send(server.address)
        while not driver.poll():
            buffer.turn()
    server.close()


class Buffer:
    def __init__(self, server: Server, log: Log) -> None:
        self.server, self.log = server, log
        self.graded: dict[int, int] = {}
        self.pulls: list[tuple[str, Pull]] = []
        self.acks: list[tuple[str, int]] = []
        self.prompt = np.arange(PROMPT_TOKENS, dtype=INT)

    def turn(self) -> None:
        """Events in, rows out, one commit, and only then what says so."""
        now = time.time()
        for event in self.server.poll(TURN_S):
            if not isinstance(event, Received):
                continue
            match event.message:
                case Rollout() as rollout:
                    self._rollout(event.worker, rollout, now)
                case Grade() as grade:
                    self.log.add_grade(event.worker, grade, now)
                    self.graded[grade.group] += 1
                case Pull() as pull:
                    self.pulls.append((event.worker, pull))
                case StepCommit() as commit:
                    self.log.commit_step(commit)
            if event.id:
                self.acks.append((event.worker, event.id))
        ready = [(worker, pull) for worker, pull in self.pulls if self._complete(pull)]
        for _, pull in ready:
            self.log.add_plan(pull.step, pull.groups)
        self.log.commit()
        for worker, id in self.acks:
            self.server.ack(worker, id)
        self.acks.clear()
        for worker, pull in ready:
            self.server.send(worker, self.log.batch(pull.step, pull.groups))
            self.pulls.remove((worker, pull))
            for group in pull.groups:
                del self.graded[group]

    def _rollout(self, worker: str, rollout: Rollout, now: float) -> None:
        group = rollout.group
        if group not in self.graded:
            self.graded[group] = 0
            self.log.add_group(
                GroupRow(
                    group=group, kind="train", source_index=group, task="hop", prompt_id=str(group), prompt=self.prompt,
                    prompt_text="", answer="{}", samples=RESPONSES, seed=group, min_version=0, issued_at=now,
                )
            )  # fmt: skip
        self.log.add_rollout(worker, rollout, now)

    def _complete(self, pull: Pull) -> bool:
        return all(self.graded.get(group) == RESPONSES for group in pull.groups)


# --- its workers ------------------------------------------------------------------------------------------------------


def connect(address: str, role: Role, name: str) -> Client:
    return Client(address, Hello(role=role, name=name, host="", pid=os.getpid()), timeout_s=TIMEOUT_S)


class Producer:
    def __init__(self, credit: Semaphore, _: Connection, address: str) -> None:
        self.credit = credit
        self.client = connect(address, "generator", "producer")
        self.groups: list[list[Response]] = []

    def prepare(self, round: Round) -> None:
        self.groups = pool(round)

    def go(self, round: Round) -> None:
        for group in range(round.first, round.first + round.groups):
            if not self.credit.acquire(timeout=TIMEOUT_S):
                raise TimeoutError(f"hop: the consumer took nothing within {TIMEOUT_S:.0f} s")
            now = time.time()
            for sample, row in enumerate(self.groups[(group - round.first) % POOL]):
                self.client.send(
                    Rollout(
                        group, sample, 0, row.tokens, row.logprobs, row.versions,
                        finish="length" if row.truncated else "stop", text="", started_at=now, finished_at=now,
                    )
                )  # fmt: skip
                self.client.send(Grade(group, sample, 0, "graded", correct=row.correct, reward=row.reward))
        self.client.flush(TIMEOUT_S)

    def check(self, round: Round) -> None:
        """The producer has nothing to check."""


class Consumer:
    """Steps of the log are numbered from 1, without a gap, over all rounds."""

    def __init__(self, credit: Semaphore, _: Connection, address: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.credit = credit
        self.client = connect(address, "learner", "consumer")
        self.step = 0
        self.tensors: dict[str, Any] = {}

    def prepare(self, round: Round) -> None:
        """Nothing is at hand: all of it comes from the buffer."""

    def go(self, round: Round) -> None:
        asks = iter(enumerate(round.chunks, start=self.step + 1))
        for _ in range(PULLS_AHEAD):
            self._pull(next(asks, None))
        for groups in round.chunks:
            batch = self.client.receive(TIMEOUT_S)
            if not isinstance(batch, Batch):
                raise TimeoutError(f"hop: got {batch}, expected a batch within {TIMEOUT_S:.0f} s")
            self._pull(next(asks, None))
            self.tensors = as_tensors(batch)
            self.step += 1
            now = time.time()
            self.client.send(StepCommit(self.step, "", "", now, now, {}))
            for _ in groups:
                self.credit.release()
        self.client.flush(TIMEOUT_S)

    def check(self, round: Round) -> None:
        last = len(round.chunks) - 1
        rows = [row for at in range(last * round.chunk, round.groups) for row in pool(round)[at % POOL]]
        versions = [np.full(count, version, INT) for row in rows for version, count in row.versions]
        expected: dict[str, Any] = {
            "tokens": np.concatenate([row.tokens for row in rows]),
            "logprobs": np.concatenate([row.logprobs for row in rows]),
            "versions": np.concatenate(versions),
            "rewards": [row.reward for row in rows],
            "correct": [row.correct for row in rows],
            "truncated": [row.truncated for row in rows],
        }
        for name, values in expected.items():
            if not np.array_equal(self.tensors[name].numpy(), values):
                raise ValueError(f"hop: Headrace gave back other {name} than were sent")

    def _pull(self, ask: tuple[int, list[int]] | None) -> None:
        if ask is not None:
            self.client.send(Pull(*ask))


def as_tensors(batch: Batch) -> dict[str, Any]:
    """The batch's columns as tensors of their own: what is decoded may only be read."""
    import torch

    names = ("lengths", "prompts", "tokens", "logprobs", "versions", "rewards", "correct", "truncated")
    return {name: torch.from_numpy(getattr(batch, name).copy()) for name in names}
