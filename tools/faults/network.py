"""A network that can be cut: this process and a far one in namespaces of their own, and a switch between them.

    run (10.77.0.1) --- switch --- far (10.77.0.2)

A cut takes the far side's port out of the switch. Frames go nowhere from then on, and neither end is told: no link goes down,
no route vanishes, no connection is reset. Needs Linux, iproute2, and the right to make network namespaces (root has it).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

RUN, FAR = "10.77.0.1", "10.77.0.2"
CLONE_NEWNET = 0x40000000
IP_S = 20.0
"""How long one `ip` may take."""


class NoNetwork(RuntimeError):
    """This machine does not let us make the network; says what failed."""


class Network:
    """For `with`: inside, this thread and whatever it starts are in the namespace `run`. One thread enters and leaves it."""

    def __init__(self) -> None:
        """Makes the namespaces. Raises `NoNetwork`."""
        self.run, self.far, self.switch = (f"headrace-{os.getpid()}-{place}" for place in ("run", "far", "switch"))
        self._home: int | None = None
        try:
            for name in (self.run, self.far, self.switch):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "bridge", "up")
            for name, port, address in ((self.run, "to-run", RUN), (self.far, "to-far", FAR)):
                _ip("link", "add", port, "netns", self.switch, "type", "veth", "peer", "name", "wire", "netns", name)
                _ip("-n", self.switch, "link", "set", port, "up", "master", "bridge")
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
                _ip("-n", name, "link", "set", "wire", "up")
        except NoNetwork:
            self._remove()
            raise

    def cut(self) -> None:
        """Nothing gets through from now on."""
        _ip("-n", self.switch, "link", "set", "to-far", "nomaster")

    def mend(self) -> None:
        _ip("-n", self.switch, "link", "set", "to-far", "master", "bridge")

    def there(self, command: list[str]) -> list[str]:
        """The command that runs `command` on the far side."""
        return ["ip", "netns", "exec", self.far, *command]

    def __enter__(self) -> Self:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        with _opened(Path("/run/netns") / self.run) as namespace:
            _move_to(namespace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._home is not None:
            _move_to(self._home)
            os.close(self._home)
            self._home = None
        self._remove()

    def _remove(self) -> None:
        """The namespaces end with the last process in them; the caller has ended its own."""
        for name in (self.run, self.far, self.switch):
            with contextlib.suppress(NoNetwork):  # it was not made
                _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=IP_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoNetwork(f"ip {' '.join(arguments)}: {error}; it needs Linux and iproute2") from error
    if done.returncode != 0:
        raise NoNetwork(f"ip {' '.join(arguments)}: {done.stderr.strip()}; network namespaces are root's to make")


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
