"""What both sides of the rollout hop's benchmark share: the groups, and a producer and a consumer process that go at once.

A round moves `groups` groups of 16 responses from the producer to the consumer, which takes them in chunks. On both
sides the producer may be `AHEAD` groups ahead of what the consumer is through with, by one semaphore.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Semaphore
from typing import Any, NamedTuple, Protocol

import numpy as np

RESPONSES = 16
AHEAD = 32
POOL = 4
"""Different groups; the rest are these again, so that no random number is drawn in a measured second."""
TIMEOUT_S = 120.0

context = multiprocessing.get_context("spawn")


class Round(NamedTuple):
    tokens: int
    """Mean length of a response."""
    groups: int
    chunk: int
    """Groups that the consumer takes at once; it divides `groups`."""
    first: int
    """The first group's number: no number comes twice in the life of a pair."""
    ragged: bool = True
    """Lengths from half to one and a half times the mean, as responses have them; else all are the same."""

    @property
    def chunks(self) -> list[list[int]]:
        return [list(range(at, at + self.chunk)) for at in range(self.first, self.first + self.groups, self.chunk)]

    @property
    def all_tokens(self) -> int:
        return self.groups * sum(lengths(self))


class Response(NamedTuple):
    """`tokens` int32 [T], `logprobs` float32 [T], `versions` runs over them (in flight, one update came)."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: list[tuple[int, int]]
    reward: float
    correct: bool
    truncated: bool


def lengths(round: Round) -> list[int]:
    """Of the responses of every group, in some order."""
    spread = round.tokens // 2 if round.ragged else 0
    return np.linspace(round.tokens - spread, round.tokens + spread, RESPONSES).astype(int).tolist()


def pool(round: Round) -> list[list[Response]]:
    """`POOL` groups, the same in every process."""
    draw = np.random.default_rng(round.tokens)
    return [
        [_response(draw, int(length), index % 3 == 0) for index, length in enumerate(draw.permutation(lengths(round)))]
        for _ in range(POOL)
    ]


def _response(draw: np.random.Generator, tokens: int, correct: bool) -> Response:
    ids = draw.integers(0, 150_000, tokens, dtype=np.int32)
    logprobs = -draw.exponential(0.5, tokens).astype(np.float32)
    runs = [(7, tokens // 3), (8, tokens - tokens // 3)]
    return Response(ids, logprobs, runs, 1.0 if correct else -1.0, correct, not correct)


class Role(Protocol):
    """One end of a hop, in its own process."""

    def prepare(self, round: Round) -> None:
        """Makes ready what a generator or a learner would have at hand."""

    def go(self, round: Round) -> None:
        """The measured part; returns when nothing of it is outstanding."""

    def check(self, round: Round) -> None:
        """Raises ValueError when what came is not what went."""


def play(driver: Connection, make: Callable[..., Role], arguments: tuple[Any, ...]) -> None:
    """The life of a role's process: does what the driver asks, and says when it was through (one monotonic clock)."""
    role = make(*arguments)
    driver.send(time.monotonic())
    while True:
        try:
            request = driver.recv()
        except EOFError:
            return
        if request is None:
            return
        what, round = request
        getattr(role, what)(round)
        driver.send(time.monotonic())


class Pair:
    """The two processes, and what they share: `credit` in groups, and a pipe by which the producer can say what is put."""

    def __init__(self, produce: Callable[..., Role], consume: Callable[..., Role], *arguments: Any) -> None:
        credit: Semaphore = context.Semaphore(AHEAD)
        heard, said = context.Pipe(duplex=False)
        self._ends: list[Connection] = []
        self.processes = []
        for name, make, end in (("consumer", consume, heard), ("producer", produce, said)):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=play, args=(theirs, make, (credit, end, *arguments)), name=name, daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._ends.append(ours)
        self._answers()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    def ask(self, what: str, round: Round) -> float:
        """Seconds until the later of the two was through."""
        began = time.monotonic()
        for end in self._ends:
            end.send((what, round))
        return max(self._answers()) - began

    def close(self) -> None:
        for process, end in zip(self.processes, self._ends, strict=True):
            if process.is_alive():
                end.send(None)
            process.join(10)
            process.kill()

    def _answers(self) -> list[float]:
        answers = []
        for process, end in zip(self.processes, self._ends, strict=True):
            try:
                if not end.poll(TIMEOUT_S):
                    raise TimeoutError(f"hop: no answer from the {process.name} within {TIMEOUT_S:.0f} s")
                answers.append(float(end.recv()))
            except EOFError as error:
                raise RuntimeError(f"hop: the {process.name} process has ended; its error is above") from error
        return answers
