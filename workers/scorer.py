"""One scoring subprocess (`workers/score.py`) as its owner sees it: start it, give it a job, kill it with all it forked.

Used by one thread, which must live as long as the process: the kernel ends the process together with that thread.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from workers.score import FRAME_LIMIT, HEADER, Job, Jobs, Ready, Result, Results, Setup, pack

START_TIMEOUT_S = 120.0
"""Seconds until a scorer must have imported what its tasks need; a busy machine takes long over sympy."""

KILL_TIMEOUT_S = 10.0

DEATH_CHECK_S = 0.05
"""How often a silent scorer is checked for being alive: a child that it forked may hold its pipe open."""

TAG = "HEADRACE_SCORER"
"""Environment variable that marks a scorer and all that it forks, those in sessions of their own too."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")

T = TypeVar("T", Ready, Results)


class ScorerError(RuntimeError):
    """A scorer cannot be started; says why. `refused` tells that it ran and found its tasks unusable."""

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class Expired(Exception):
    """The deadline passed without an answer."""


class Died(Exception):
    """The process ended, or answered with something that is no answer."""


class Scorer:
    """One scoring process. After any exception it is dead, and `start` makes another."""

    def __init__(self, setup: Setup, program: str = "workers.score") -> None:
        """`program` is the module that the process runs."""
        self._setup, self._program = setup, program
        self._process: subprocess.Popen[bytes] | None = None
        self._tag = ""
        self._jobs = 0

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Returns when the process is ready to score. Raises `ScorerError`."""
        self._tag = f"{os.getpid()}-{uuid.uuid4().hex}"
        environment = {
            **os.environ,
            **dict.fromkeys(THREADS, "1"),
            TAG: self._tag,
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),  # it imports what we can
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore::SyntaxWarning", "-m", self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
            ready = self._exchange(self._setup, Ready, START_TIMEOUT_S)
        except OSError as error:
            raise ScorerError(f"scorer process cannot be started: {error}") from error
        except Expired as error:
            raise ScorerError(f"scorer process was not ready within {START_TIMEOUT_S:g} s") from error
        except Died as error:
            raise ScorerError(f"scorer process ended before it was ready: {error}") from error
        if ready.error is not None:
            self.kill()
            raise ScorerError(ready.error, refused=True)

    def grade(self, task: str, responses: Sequence[tuple[str, str]], timeout_s: float) -> list[Result]:
        """Score (text, answer) of each response to `task`. Raises `Expired` or `Died`; the process is dead then."""
        jobs = [Job(self._jobs + number, task, *response) for number, response in enumerate(responses, 1)]
        self._jobs += len(jobs)
        results = self._exchange(Jobs(jobs), Results, timeout_s).results
        if [result.id for result in results] != [job.id for job in jobs]:
            self.kill()
            raise Died(f"answered jobs {[result.id for result in results]} instead of {[job.id for job in jobs]}")
        if results[-1].last:
            self.kill()
        return results

    def kill(self) -> None:
        """Ends the process and everything that it forked; returns when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):  # ended and left nothing in its session
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # stuck inside the kernel: it ends when that call does
            process.wait(KILL_TIMEOUT_S)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        _kill_tagged(self._tag)

    def interrupt(self) -> None:
        """From any thread: end what runs now; the owner's `grade` or `start` raises, and the owner cleans up."""
        process = self._process
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def idle_and_silent(self) -> bool:
        """The process lives and has said nothing unasked (left-over children of a scored function might)."""
        process = self._process
        if process is None or process.stdout is None or process.poll() is not None:
            return False
        poller = select.poll()
        poller.register(process.stdout, select.POLLIN)
        return not poller.poll(0)

    def _exchange(self, message: Setup | Jobs, kind: type[T], timeout_s: float) -> T:
        try:
            body = self._converse(pack(message), time.monotonic() + timeout_s)
            return msgspec.msgpack.decode(body, type=kind)
        except msgspec.DecodeError as error:
            self.kill()
            raise Died(f"answered with something else than a {kind.__name__}: {error}") from error
        except (Expired, Died):
            self.kill()
            raise

    def _converse(self, frame: bytes, deadline: float) -> bytes:
        """Writes a frame and reads one, never waiting beyond the deadline for either. Returns its body."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise Died("was not running")
        sink, source = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(sink, False)
        outgoing, incoming = memoryview(frame), bytearray()
        poller = select.poll()
        poller.register(source, select.POLLIN)
        poller.register(sink, select.POLLOUT)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Expired
            ready = dict(poller.poll(1000 * min(left, DEATH_CHECK_S)))
            if source in ready:
                piece = os.read(source, 1 << 16)
                incoming += piece
                if (body := _complete(incoming)) is not None:
                    return body
                if not piece:
                    raise Died(_ending(process))
            elif outgoing and sink in ready:
                try:
                    outgoing = outgoing[os.write(sink, outgoing) :]
                except BrokenPipeError:
                    raise Died(_ending(process)) from None
                if not outgoing:
                    poller.unregister(sink)
            elif process.poll() is not None:
                raise Died(_ending(process))


def _complete(incoming: bytearray) -> bytes | None:
    """The body, once all of it is there. Raises `Died` for bytes that no single frame explains."""
    if len(incoming) < HEADER.size:
        return None
    (size,) = HEADER.unpack_from(incoming)
    if size > FRAME_LIMIT or len(incoming) > HEADER.size + size:
        raise Died(f"wrote into the answer's stream: a frame of {size} bytes with {len(incoming)} bytes read")
    return bytes(incoming[HEADER.size :]) if len(incoming) == HEADER.size + size else None


def _ending(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "closed its streams"
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _kill_tagged(tag: str) -> None:
    """SIGKILL to every process that inherited this tag, until a look at all of them finds none (they may fork on)."""
    mark = f"{TAG}={tag}".encode()
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        found = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal() and _marked(entry, mark)]
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return


def _marked(pid: str, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment:  # empty for a process that has ended
            return mark in environment.read().split(b"\0")
    except OSError:  # another user's, or gone
        return False
