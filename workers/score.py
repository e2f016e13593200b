"""The scorer: a process that scores responses and may be killed at any moment.

    python -m workers.score        (started by `workers/scorer_pool.py`, never by hand)

Frames on standard input and output are a 4-byte big-endian length and a MessagePack body: first a `Setup`, answered by
a `Ready`; then each `Jobs` is answered by `Results`, in the same order. Both streams are moved to private descriptors before any foreign
code runs: what that code prints goes to standard error, what it reads is empty.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from engine.config import ConfigError, Task
from engine.rewards import RewardError, Score, prepare, score
from workers.tether import die_with_parent

HEADER = struct.Struct(">I")
FRAME_LIMIT = 64 << 20
"""Bytes of one frame, both ways: a response of 10 million tokens fits, a length read from garbage does not."""

DETAIL_LIMIT = 2000


class Setup(Struct, frozen=True):
    """What this scorer is for. `memory_mb` bounds the address space of this process and of each child it forks."""

    tasks: dict[str, Task]
    memory_mb: int
    parent: int


class Ready(Struct, frozen=True):
    """Imports are done and the tasks are prepared; or `error` says what failed."""

    error: str | None = None


class Job(Struct, frozen=True):
    """One response to score; `answer` is its data row's JSON document."""

    id: int
    task: str
    text: str
    answer: str


class Result(Struct, frozen=True):
    """The `Score` of job `id`, or `error`. After `last` this process must not be used again."""

    id: int
    correct: bool = False
    value: float = 0.0
    parts: dict[str, float] = {}
    reward: float | None = None
    detail: str = ""
    error: str | None = None
    last: bool = False


class Jobs(Struct, frozen=True):
    """Of one task: several at once where a scorer is quicker so (`workers/score_documents.py`), else one."""

    jobs: list[Job]


class Results(Struct, frozen=True):
    """Of the jobs before one that was the last, or of all."""

    results: list[Result]


def pack(message: Setup | Ready | Jobs | Results) -> bytes:
    """A frame: length and body."""
    body = msgspec.msgpack.encode(message)
    return HEADER.pack(len(body)) + body


Scoring = Callable[[Sequence[Job]], list[Score | BaseException]]
"""The score of each job, or what it raised, in order; those after one that left no memory may be missing."""


def main() -> None:
    """Scores without a model, one job after the other."""
    serve(one_by_one)


def one_by_one(setup: Setup) -> Scoring:
    """Prepares the tasks."""
    for task in setup.tasks.values():
        prepare(task)

    def scores(jobs: Sequence[Job]) -> list[Score | BaseException]:
        found: list[Score | BaseException] = []
        for job in jobs:
            try:
                found.append(score(setup.tasks[job.task], job.text, job.answer))
            except (
                BaseException
            ) as error:  # the edge of foreign code; SystemExit and KeyboardInterrupt are its failures too
                found.append(error)
                if _out_of_memory(error):
                    break
        return found

    return scores


def serve(load: Callable[[Setup], Scoring], *, model: bool = False) -> None:
    """Scores jobs until the stream ends. Never returns to an interpreter that foreign threads could keep alive. With a
    `model` the memory budget is for what comes beside what it takes when it is loaded."""
    source, sink = _private_streams()
    setup = msgspec.msgpack.decode(_read(source), type=Setup)
    die_with_parent(setup.parent, signal.SIGKILL)
    if not model:
        limit_memory(setup.memory_mb)
    sys.path.append(os.getcwd())
    home = os.getpid()
    error, scoring = None, None
    try:
        scoring = load(setup)
        if model:
            limit_memory(setup.memory_mb + _address_space_mb())
    except BaseException as caught:  # an imported module may raise anything, SystemExit included
        error = _describe(caught, setup.memory_mb)
    _write(sink, Ready(error), home)
    while scoring is not None and error is None and (frame := _read(source)):
        results = _grade(msgspec.msgpack.decode(frame, type=Jobs).jobs, scoring, setup.memory_mb)
        _write(sink, results, home)
        if results.results[-1].last:
            break
    os._exit(0)


def _grade(jobs: Sequence[Job], scoring: Scoring, memory_mb: int) -> Results:
    results = []
    for job, outcome in zip(jobs, scoring(jobs), strict=False):
        if isinstance(outcome, BaseException):
            error, last = _describe(outcome, memory_mb), _out_of_memory(outcome)
            results.append(Result(id=job.id, error=error, last=last))
        else:
            results.append(
                Result(
                    id=job.id,
                    correct=outcome.correct,
                    value=outcome.value,
                    parts=outcome.parts,
                    reward=outcome.reward,
                    detail=_sendable(outcome.detail),
                )
            )
    return Results(results)


def _describe(error: BaseException, memory_mb: int) -> str:
    if isinstance(error, RewardError | ConfigError):
        text = str(error)
    elif _out_of_memory(error):
        text = f"out of memory: over the budget of reward.memory_mb = {memory_mb} ({type(error).__name__})"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""
        text = f"{type(error).__name__}: {error}{where}"
    return _sendable(text)


def _sendable(text: str) -> str:
    """A text that MessagePack and SQLite take: no lone surrogates, and not the whole response again."""
    return text[:DETAIL_LIMIT].encode("utf-8", "replace").decode()


def _out_of_memory(error: BaseException) -> bool:
    """Also what the system and the dynamic linker say where no address space is left."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or (isinstance(error, ImportError) and "failed to map segment" in str(error))


def _address_space_mb() -> int:
    """What this process has mapped; a GPU's driver alone maps more than the machine has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize() >> 20


def limit_memory(memory_mb: int) -> None:
    """Of the address space of this process and of each child that it forks."""
    budget = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (budget, budget))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _private_streams() -> tuple[int, int]:
    """Descriptors of the pool's pipe; 0 becomes empty and 1 becomes standard error for everybody else."""
    source, sink = os.dup(0), os.dup(1)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    os.close(empty)
    return source, sink


def _read(source: int) -> bytes:
    """One frame's body; empty at the end of the stream."""
    header = _read_exactly(source, HEADER.size)
    return _read_exactly(source, *HEADER.unpack(header)) if header else b""


def _read_exactly(source: int, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        piece = os.read(source, min(size - len(pieces), 1 << 20))
        if not piece:
            return b""
        pieces += piece
    return bytes(pieces)


def _write(sink: int, message: Ready | Results, home: int) -> None:
    if os.getpid() != home:
        os._exit(0)  # a child that foreign code forked and let return: it must neither answer nor take a job
    frame = memoryview(pack(message))
    while frame:
        frame = frame[os.write(sink, frame) :]


if __name__ == "__main__":
    main()
