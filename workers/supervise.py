"""Child processes of the launcher: started with a log file each, watched, and ended without leaving anything behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from msgspec import Struct

from workers.last_words import KEY, LastWords

NAMES_AN_ERROR = re.compile(
    r"(\[rank\d+\]: *)?(headrace: |(?!torch\.distributed\.elastic)[\w.]*(Error|Exception|Diverged|Refused): )"
)
TETHER = Path(__file__).with_name("tether.py")


class Exit(Struct, frozen=True):
    """A child that ended by itself: its exit code (negative: the signal), seconds lived, and its last lines. `refusal`
    is why it, or a process below it, must not be started again."""

    name: str
    code: int
    lived_s: float
    tail: str
    refusal: str = ""

    @property
    def how(self) -> str:
        return f"exit code {self.code}" if self.code >= 0 else f"signal {signal.Signals(-self.code).name}"


@dataclass(slots=True)
class Child:
    process: subprocess.Popen[bytes]
    log: Path
    offset: int
    words: LastWords
    started: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs named commands, each in its own session, so that a terminal's Ctrl-C reaches the launcher alone, and tied
    to this process, so that none outlives it. Output of NAME is appended to `logs/NAME.log`."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: list[str], env: Mapping[str, str]) -> str:
        """Starts a command under a name that is not running; returns what it runs as. Raises OSError when it cannot."""
        if name in self._children:
            raise ValueError(f"{name} is running already (pid {self._children[name].process.pid})")
        path = self._logs / f"{name}.log"
        words = LastWords()
        try:
            with path.open("ab") as log:
                offset = log.tell()
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command],
                    env={**os.environ, **env, "PYTHONUNBUFFERED": "1", KEY: words.path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError:
            words.close()
            raise
        self._children[name] = Child(process, path, offset, words)
        return f"pid {process.pid}"

    @property
    def running(self) -> list[str]:
        return list(self._children)

    def pid(self, name: str) -> int:
        return self._children[name].process.pid

    def exits(self) -> list[Exit]:
        """The children that ended since the last call."""
        ended = [(name, child) for name, child in self._children.items() if child.process.poll() is not None]
        found = []
        for name, child in ended:
            del self._children[name]
            _signal_session(child.process.pid, signal.SIGKILL)  # what it may have left behind
            lived_s, tail = time.monotonic() - child.started, tail_of(child.log, child.offset)
            found.append(Exit(name, child.process.returncode, lived_s, tail, child.words.read()))
            child.words.close()
        return found

    def ask_to_end(self, name: str) -> None:
        """SIGTERM, without waiting: its end comes out of `exits`."""
        _signal_session(self.pid(name), signal.SIGTERM)

    def stop(self, names: Iterable[str], *, grace_s: float, hurried: Callable[[], bool] = lambda: False) -> list[str]:
        """SIGTERM, then after `grace_s`, or once `hurried()`, SIGKILL to each with all its descendants; returns those
        that had to be killed."""
        stopping = {name: self._children[name] for name in names if name in self._children}
        offspring = [process for child in stopping.values() for process in _descendants(child.process)]
        for name in stopping:
            self.ask_to_end(name)
        deadline = time.monotonic() + grace_s
        while any(child.process.poll() is None for child in stopping.values()):
            if time.monotonic() > deadline or hurried():
                break
            time.sleep(0.02)
        killed = [name for name, child in stopping.items() if child.process.poll() is None]
        offspring += [process for name in killed for process in _descendants(stopping[name].process)]
        for name, child in stopping.items():
            _signal_session(child.process.pid, signal.SIGKILL)
            child.process.wait(timeout=30)
            child.words.close()
            del self._children[name]
        for process in offspring:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares creation times, so a pid that is used again is safe
        return killed


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Also those in sessions of their own: torchrun starts its ranks that way."""
    if process.poll() is not None:
        return []
    try:
        return list(psutil.Process(process.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _signal_session(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return


def tail_of(log: Path, offset: int, lines: int = 12) -> str:
    """The last lines that a child wrote, from where its log stood when it started, and before them the newest that
    names an error, for torchrun puts a table of its own below those of its ranks."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - 65_536))
        text = file.read().decode(errors="replace")
    written = [line for line in text.splitlines() if line.strip()]
    named = [line for line in written[:-lines] if NAMES_AN_ERROR.match(line)]
    return "\n".join([*named[-1:], *written[-lines:]])
