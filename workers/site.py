"""Where a launch puts its roles: on this machine, in an allocation of Slurm, on a cluster of Ray.

A site starts what it is told and says what has ended; who is started anew, and when, is the launcher's to decide
everywhere. Everywhere, too, the buffer is on the launcher's own machine: the launcher reads the log that the buffer writes,
and SQLite's write-ahead log may be shared by processes of one machine, never over a network.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from engine.config import Config, ConfigError
from protocols.link_keys import is_local
from workers.roles import Rendezvous, role_of
from workers.supervise import Exit, Supervisor

TOKEN = "launch.token"
"""In the run's folder: what a role's machine must find there before the role starts."""
SAME_FOLDER = Path(__file__).with_name("same_folder.py")


class Keeper(Protocol):
    """Runs named commands; `supervise.Supervisor` says what each of these does."""

    @property
    def running(self) -> list[str]: ...
    def start(self, name: str, command: list[str], env: Mapping[str, str]) -> str: ...
    def exits(self) -> list[Exit]: ...
    def ask_to_end(self, name: str) -> None: ...
    def stop(self, names: Iterable[str], *, grace_s: float, hurried: Callable[[], bool] = ...) -> list[str]: ...


class Site(Protocol):
    option: tuple[str, ...]
    """What `headrace launch` is told to come here, in the command that continues a run."""
    shares_gpus: bool
    """Whether all roles see this machine's GPUs, and the launcher must divide them."""

    def keeper(self, config: Config, logs: Path) -> Keeper: ...
    def prepare(self, config: Config) -> None:
        """Before anything starts. Raises `ConfigError` where a machine of the site cannot take its roles."""

    def bind(self, config: Config) -> str:
        """Where the buffer listens; empty for where the config says."""

    def rendezvous(self, config: Config) -> Rendezvous:
        """Where the learner's ranks meet; asked at each of its starts."""


class Here:
    """One machine, this one."""

    option: tuple[str, ...] = ()
    shares_gpus = True

    def keeper(self, config: Config, logs: Path) -> Keeper:
        return Supervisor(logs)

    def prepare(self, config: Config) -> None:
        return

    def bind(self, config: Config) -> str:
        return ""

    def rendezvous(self, config: Config) -> Rendezvous:
        return Rendezvous()


HERE = Here()


def is_elsewhere(name: str) -> bool:
    """Whether a process may run on another machine than the launcher's."""
    return role_of(name) in ("learner", "generator")


# --- one folder seen by all -------------------------------------------------------------------------------------------


def write_token(run_dir: Path) -> None:
    """A token that only who sees this very folder can know; in it until the next launch."""
    (run_dir / TOKEN).write_text(secrets.token_hex(16), encoding="utf-8")


def in_same_folder(run_dir: Path, command: Iterable[str]) -> list[str]:
    """`command` for another machine: it ends with an error that names both sides where the run's folder is another there.
    A token must have been written."""
    token = (run_dir / TOKEN).read_text(encoding="utf-8")
    folder = [str(run_dir.resolve() / TOKEN), token, socket.gethostname(), str(Path.cwd())]
    return [sys.executable, "-I", "-S", str(SAME_FOLDER), *folder, *command]


# --- addresses ----------------------------------------------------------------------------------------------------------


def reachable_bind(config: Config, others: Iterable[str]) -> str:
    """An address for the buffer that the machines `others` (names or IPs) reach: the config's where it names one, else this
    machine's own towards them, with the config's port. Raises `ConfigError` for a name that leads nowhere."""
    named = urlsplit(config.buffer.address)
    host, port = named.hostname or "", named.port or 0
    if not is_local(config.buffer.address) and host not in ("0.0.0.0", "::", "*"):
        return config.buffer.address
    own = "127.0.0.1"
    for other in others:
        own = address_towards(other)
        if not ipaddress.ip_address(own).is_loopback:
            break
    return f"tcp://{own}:{port}"


def address_towards(other: str) -> str:
    """This machine's address on the way to `other`. Raises `ConfigError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.closing(probe):
        try:
            probe.connect((other, 9))  # sends nothing: it only makes the kernel choose the outgoing interface
        except OSError as error:
            raise ConfigError(f"{socket.gethostname()} knows no way to {other}: {error.strerror or error}") from error
        return str(probe.getsockname()[0])
