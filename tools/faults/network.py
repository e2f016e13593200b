"""A network that can be cut: this process and a far one in namespaces of their own, and a switch between them.

run (10.77.0.1) --- switch --- far (10.77.0.2)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tools.faults.switch import NoNetwork, Switch

RUN = "10.77.0.1"
CLONE_NEWNET = 0x40000000


class Network:
    """For `with`: inside, this thread and whatever it starts are in the namespace `run`. One thread enters and leaves it."""

    def __init__(self) -> None:
        """Makes the namespaces. Raises `NoNetwork`."""
        self._switch = Switch(["run", "far"])
        self._home: int | None = None

    def cut(self) -> None:
        """Nothing gets through from now on, and nobody is told."""
        self._switch.cut("far")

    def mend(self) -> None:
        self._switch.mend("far")

    def there(self, command: list[str]) -> list[str]:
        """The command that runs `command` on the far side."""
        return self._switch.on("far", command)

    def __enter__(self) -> Self:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with _opened(Path("/run/netns") / self._switch.namespace("run")) as namespace:
            _move_to(namespace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._home is not None:
            _move_to(self._home)
            os.close(self._home)
            self._home = None
        self._switch.close()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield number
    finally:
        os.close(number)


def _move_to(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise NoNetwork(f"setns: {os.strerror(ctypes.get_errno())}")
