"""Keys for the link beyond this machine: CURVE (Curve25519), one key pair of the buffer and one of each role.

A folder made by `make_keys` holds one file for each, and a machine needs the files of its own roles and no others:
`buffer.key` has the buffer's secret and the roles' public keys, `ROLE.key` the role's secret and the buffer's public key.
Keys are text in Z85, ZeroMQ's own form. They never leave these files but into a socket's options.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import stat
import tempfile
import tomllib
from pathlib import Path
from typing import TypeVar, get_args

import msgspec
import zmq
from msgspec import Struct

from protocols.link_errors import LinkError
from protocols.link_messages import Role

BUFFER = "buffer"
ROLES: tuple[str, ...] = get_args(Role)
Z85_LENGTH = 40


class KeysError(LinkError):
    """Keys are missing, cannot be used, or lie where others can read them; says which file, and what to do."""


class BufferKeys(Struct, frozen=True):
    """`public` and `secret` of the buffer, and the public key of each role."""

    public: str
    secret: str
    roles: dict[str, str]

    def __post_init__(self) -> None:
        _check_keys(self.public, self.secret, *self.roles.values())
        if unknown := sorted(self.roles.keys() - set(ROLES)):
            raise ValueError(f"roles: got {unknown}, expected only {list(ROLES)}")

    def __repr__(self) -> str:
        return f"BufferKeys(roles={sorted(self.roles)})"


class WorkerKeys(Struct, frozen=True):
    """`public` and `secret` of a role, and the public key of the buffer that it trusts."""

    role: str
    public: str
    secret: str
    buffer: str

    def __post_init__(self) -> None:
        _check_keys(self.public, self.secret, self.buffer)

    def __repr__(self) -> str:
        return f"WorkerKeys(role={self.role!r})"


def make_keys(folder: str | Path) -> list[Path]:
    """New keys in `folder` (made, mode 0700; files 0600), all of them or none. Raises `KeysError` where it holds files."""
    folder = Path(folder)
    _need_curve()
    public, secret = _pair()
    pairs = {role: _pair() for role in ROLES}
    table = "".join(f'{role} = "{pair[0]}"\n' for role, pair in pairs.items())
    texts = {BUFFER: f'# SECRET: of the buffer alone.\npublic = "{public}"\nsecret = "{secret}"\n\n[roles]\n{table}'}
    for role, pair in pairs.items():
        comment = f"# SECRET: a machine that runs a {role} needs this file and no other."
        texts[role] = f'{comment}\nrole = "{role}"\npublic = "{pair[0]}"\nsecret = "{pair[1]}"\nbuffer = "{public}"\n'
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, text in texts.items():
                with os.fdopen(os.open(made / f"{name}.key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            made.replace(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        what = "it holds files already; name a new folder" if folder.exists() else error.strerror
        raise KeysError(f"keys: {folder}: {what}") from error
    return [folder / f"{name}.key" for name in texts]


def read_buffer_keys(folder: str | Path) -> BufferKeys:
    """Raises `KeysError`."""
    return _read(Path(folder) / f"{BUFFER}.key", BufferKeys)


def read_worker_keys(folder: str | Path, role: str) -> WorkerKeys:
    """Raises `KeysError`."""
    path = Path(folder) / f"{role}.key"
    keys = _read(path, WorkerKeys)
    if keys.role != role:
        raise KeysError(f"{path}: got the keys of a {keys.role}, expected those of a {role}")
    return keys


def is_local(address: str) -> bool:
    """Whether only this machine reaches `address`; of a name only `localhost` counts as known to do so."""
    if not address.startswith("tcp://"):
        return (
            address.startswith(("ipc://", "inproc://")) or "://" not in address
        )  # the last is none, and refused as such
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host in ("localhost", "lo"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def require_keys(keys: object, address: str, who: str) -> None:
    """Raises `KeysError` where `address` reaches beyond this machine and there are no keys."""
    if keys is None and not is_local(address):
        raise KeysError(
            f"{who}: {address} reaches beyond this machine, and there are no keys; "
            'make them with `headrace keygen DIR` and set buffer.keys = "DIR"'
        )


K = TypeVar("K", BufferKeys, WorkerKeys)


def _read(path: Path, kind: type[K]) -> K:
    _need_curve()
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1 << 16).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise KeysError(f"keys: {path}: {why}; `headrace keygen DIR` makes keys, each in a file of its own") from error
    if mode & 0o077:
        raise KeysError(f"keys: {path}: others may read it (mode {mode:04o}); make it private with chmod 600")
    try:
        return msgspec.convert(tomllib.loads(text), kind)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        # Not the error's text: it might quote what it could not read.
        raise KeysError(f"keys: {path}: {type(error).__name__}: not a file that `headrace keygen` made") from None


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def _check_keys(*keys: str) -> None:
    if any(len(key) != Z85_LENGTH or not key.isascii() for key in keys):
        raise ValueError(f"a key that is not of {Z85_LENGTH} characters")


def _need_curve() -> None:
    if not zmq.has("curve"):
        raise KeysError("keys: this libzmq is built without CURVE; install pyzmq from a wheel")
