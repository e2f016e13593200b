"""The control plane: small messages through queues of a TCPStore that the learner serves.

    inbox        every subscriber to the publisher
    to/N         the publisher to member N, in order
    member/N     exists while the publisher counts N as a member
    joins        the number of the newest member
    group/E/...  what a process group of epoch E needs to find its peers; removed once it is built

A queue vanishes with its last message and the publisher removes the rest, so the store does not grow. It knows no
passwords: whoever reaches it can join. Beyond this machine it stands behind a token's `gate`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from datetime import timedelta

import msgspec
from msgspec import Struct
from torch.distributed import QueueEmptyError, TCPStore

from engine.weights.layout import Layout
from engine.weights.patch import PatchLayout

log = logging.getLogger(__name__)

INBOX = "inbox"
FOREVER = timedelta(days=365)
"""Blocking reads do not use the store's timeout: each expiry writes a warning to stderr. Liveness is told by beats."""
PROBE_S, RETRY_S = 5.0, 0.2
"""One attempt at a connection, and the pause after one that was refused."""


class Join(Struct, frozen=True, tag="join"):
    """I want every update. `version` is the newest that I hold; `backend` moves my payloads."""

    member: int
    name: str
    backend: str
    version: int | None = None


class Beat(Struct, frozen=True, tag="beat"):
    member: int


class Ready(Struct, frozen=True, tag="ready"):
    """The memory for this offer is there: `nbytes` of it."""

    member: int
    offer: int
    nbytes: int


class Done(Struct, frozen=True, tag="done"):
    """All tensors of this offer are verified."""

    member: int
    offer: int


class Refused(Struct, frozen=True, tag="refused"):
    """These tensors of this offer failed their check."""

    member: int
    offer: int
    tensors: list[str]


class Failed(Struct, frozen=True, tag="failed"):
    """This offer could not be received, and why."""

    member: int
    offer: int
    reason: str


class Leave(Struct, frozen=True, tag="leave"):
    member: int


class Offer(Struct, frozen=True, tag="offer"):
    """Version `version` is to be had; make room for it. With a `patch`, as the change of a version that is held."""

    offer: int
    version: int
    bucket_bytes: int
    layout: Layout
    patch: PatchLayout | None = None


class Take(Struct, frozen=True, tag="take"):
    """Receive this offer now, as `rank` of `size` in the group of `epoch`."""

    offer: int
    epoch: int
    rank: int
    size: int


class Check(Struct, frozen=True, tag="check"):
    """What the bytes of this offer must hash to, in the layout's order."""

    offer: int
    fingerprints: list[str]


class Dropped(Struct, frozen=True, tag="dropped"):
    """You are no member any more; join again."""


class Reject(Struct, frozen=True, tag="reject"):
    """You cannot be a member, and why."""

    reason: str


class Stop(Struct, frozen=True, tag="stop"):
    """A subscriber to its own thread: end."""


ToPublisher = Join | Beat | Ready | Done | Refused | Failed | Leave
ToMember = Offer | Take | Check | Dropped | Reject | Stop


def serve_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """A store that listens on `host` alone (a bare TCPStore would listen on every address). Raises `OSError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=4096)
    except OSError as error:
        raise OSError(error.errno, f"weights store: cannot listen on {host}:{port}: {error}") from error
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def open_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """A client of the store at `host:port`. Raises `ConnectionError` when it does not answer within `timeout_s`."""
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise ConnectionError(f"weights store at {host}:{port}: no answer within {timeout_s} s") from error


def await_listener(host: str, port: int, timeout_s: float, given_up: threading.Event) -> None:
    """Return once somebody listens at `host:port`. Raises `ConnectionError` after `timeout_s`, and soon after `given_up`
    is set: an attempt of torch's own cannot be called off, and aborts a process that ends meanwhile."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, min(PROBE_S, deadline - time.monotonic()))).close()
            return
        except OSError as error:
            if given_up.wait(RETRY_S):
                raise ConnectionError(f"weights store at {host}:{port}: given up") from error
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"weights store at {host}:{port}: no answer within {timeout_s} s: {error}"
                ) from error


def local_address(host: str, port: int) -> str:
    """The address of this machine from which `host` is reached. Peers find one another by it, not by host names."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # of a datagram socket: picks the route, sends nothing
        return str(probe.getsockname()[0])


def send(store: TCPStore, queue: str, message: ToPublisher | ToMember) -> None:
    store.queue_push(queue, msgspec.json.encode(message).decode())


def receive(store: TCPStore, member: int) -> ToMember:
    """The next message to `member`; blocks until there is one. Raises torch's `RuntimeError` when the connection is
    lost, `msgspec.DecodeError` for a message of no known form."""
    while True:
        try:
            message: ToMember = msgspec.json.decode(store.queue_pop(queue_of(member)), type=ToMember)
            return message
        except QueueEmptyError:  # this process was stopped between being woken and reading; `forget` came in between
            continue


def inbox(store: TCPStore) -> list[ToPublisher]:
    """All messages that wait for the publisher; never blocks. What is of no known form is reported and left out."""
    messages: list[ToPublisher] = []
    for raw in _drain(store, INBOX):
        try:
            messages.append(msgspec.json.decode(raw, type=ToPublisher))
        except msgspec.DecodeError as error:
            log.error("weights: a message in the store is not ours: %s", error)
    return messages


def forget(store: TCPStore, member: int) -> None:
    """Remove what the store holds about `member`, who learns from it that he was dropped."""
    store.delete_key(member_key(member))
    _drain(store, queue_of(member))


def queue_of(member: int) -> str:
    return f"to/{member}"


def member_key(member: int) -> str:
    return f"member/{member}"


def _drain(store: TCPStore, queue: str) -> list[bytes]:
    found: list[bytes] = []
    try:
        while store.queue_len(queue):
            found.append(store.queue_pop(queue, block=False))
    except QueueEmptyError:  # its owner was quicker
        pass
    return found
