"""Hosts that are network namespaces, on one switch. Needs Linux, iproute2, and the right to make them (root has it)."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Sequence

COMMAND_S = 20.0
"""How long one `ip` or `tc` may take."""


class NoNetwork(RuntimeError):
    """This machine does not let us make the network; says what failed."""


class Switch:
    """`hosts` have the addresses 10.77.0.1, 10.77.0.2, ...; `close` removes all of it."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Makes the namespaces. Raises `NoNetwork`."""
        self._hosts = list(hosts)
        self._switch = self.namespace("switch")
        try:
            for name in (self._switch, *map(self.namespace, hosts)):
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host in hosts:
                name, port = self.namespace(host), f"to-{host}"
                peer = ["type", "veth", "peer", "name", "wire", "netns", name]
                _run("ip", "link", "add", port, "netns", self._switch, *peer)
                self.mend(host)
                _run("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "wire")
                _run("ip", "-n", name, "link", "set", "wire", "up")
        except NoNetwork:
            self.close()
            raise

    def namespace(self, host: str) -> str:
        return f"headrace-{os.getpid()}-{host}"

    def address(self, host: str) -> str:
        return f"10.77.0.{1 + self._hosts.index(host)}"

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs `command` there."""
        return ["ip", "netns", "exec", self.namespace(host), *command]

    def cut(self, host: str) -> None:
        """Takes the host's port out of the switch. Frames go nowhere from then on, and neither end is told: no link goes down, no
        route vanishes, no connection is reset."""
        _run("ip", "-n", self._switch, "link", "set", f"to-{host}", "nomaster")

    def mend(self, host: str) -> None:
        _run("ip", "-n", self._switch, "link", "set", f"to-{host}", "up", "master", "bridge")

    def limit(self, host: str, mbit: int) -> None:
        """The host sends at most so many Mbit a second. Raises `NoNetwork` where the kernel cannot."""
        shape = ["tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms"]
        _run(*self.on(host, ["tc", "qdisc", "replace", "dev", "wire", "root", *shape]))

    def close(self) -> None:
        """The namespaces end with the last process in them; the caller has ended its own."""
        for name in (self._switch, *map(self.namespace, self._hosts)):
            with contextlib.suppress(NoNetwork):  # it was not made
                _run("ip", "netns", "del", name)


def _run(*command: str) -> None:
    what = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoNetwork(f"{what}: {error}; it needs Linux and iproute2") from error
    if done.returncode != 0:
        raise NoNetwork(f"{what}: {done.stderr.strip()}; network namespaces are root's to make")
