"""The processes of a launched run, by the names of their roles, and how they are killed, stopped and found left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator

import psutil

CLI = "workers.cli"
LEARNER = "learner"


def roles_of(launcher: psutil.Process) -> dict[str, psutil.Process]:
    """By name: `buffer`, `learner`, `generator-0`, `reward-0`, and under torchrun `learner rank 1`."""
    found: dict[str, psutil.Process] = {}
    for child in _children(launcher):
        name = _name(child)
        if name is None:
            continue
        found[name] = child
        if name == LEARNER:
            ranks = {rank: process for process in _children(child) if (rank := _rank(process)) is not None}
            found |= {f"{LEARNER} rank {rank}": ranks[rank] for rank in sorted(ranks)}
    return found


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and everything below it, itself first; nothing when it is gone."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def naming(argument: str) -> list[psutil.Process]:
    """Processes, but for this one, that have it in their command lines, wherever they hang."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and argument in process.cmdline():
                found.append(process)
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; psutil compares creation times, so a pid that is used again is not one of them."""
    return [process for process in processes if process.is_running() and _status(process) != psutil.STATUS_ZOMBIE]


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextlib.contextmanager
def slowed(process: psutil.Process, *, stopped_s: float, runs_s: float) -> Iterator[None]:
    """A process that gets little of the machine: it goes on and is stopped in turns, and goes on in the end."""
    over = threading.Event()

    def slow() -> None:
        while not over.wait(runs_s):
            send([process], signal.SIGSTOP)
            over.wait(stopped_s)
            send([process], signal.SIGCONT)

    thread = threading.Thread(target=slow, name="slowed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10.0)


def gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Waits until they have ended; those that have not in time."""
    deadline, left = time.monotonic() + timeout_s, list(processes)
    while (left := alive(left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def cut_power(launcher: psutil.Process) -> list[psutil.Process]:
    """Kills a launcher with everything below it: all stop first, so that nobody sees another's end. Returns what is
    still there after a while, which should be nothing."""
    everything = tree(launcher)
    for _ in range(2):  # what was started while the first were stopped
        send(everything, signal.SIGSTOP)
        everything = [*everything, *(p for process in everything for p in tree(process) if p not in everything)]
    send(everything, signal.SIGKILL)
    return gone(everything, 30.0)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []


def _name(process: psutil.Process) -> str | None:
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    if CLI not in words[:-1]:
        return None
    role, rest = words[words.index(CLI) + 1], words[words.index(CLI) + 2 :]
    return rest[rest.index("--name") + 1] if "--name" in rest[:-1] else role


def _rank(process: psutil.Process) -> int | None:
    try:
        rank = process.environ().get("RANK")
    except psutil.Error:
        return None
    return int(rank) if rank is not None else None


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)
