"""The control plane: small messages through queues of a TCPStore that the learner serves.

    inbox        every subscriber to the publisher
    to/N         the publisher to member N, in order
    member/N     exists while the publisher counts N as a member
    keepers      the learner's other ranks to the publisher
    share/K      the publisher to the rank that keeps share K
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
from typing import TypeVar

import msgspec
from msgspec.json import Decoder
from torch.distributed import QueueEmptyError, TCPStore

from engine.weights.messages import FromKeeper, ToKeeper, ToMember, ToPublisher

log = logging.getLogger(__name__)

INBOX, KEEPERS = "inbox", "keepers"
FOREVER = timedelta(days=365)
"""Blocking reads do not use the store's timeout: each expiry writes a warning to stderr. Liveness is told by beats."""
PROBE_S, RETRY_S = 5.0, 0.2
"""One attempt at a connection, and the pause after one that was refused."""

T = TypeVar("T")


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


def send(store: TCPStore, queue: str, message: ToPublisher | ToMember | FromKeeper | ToKeeper) -> None:
    store.queue_push(queue, msgspec.json.encode(message).decode())


def receive(store: TCPStore, queue: str, messages: Decoder[T]) -> T:
    """The next of `messages`; blocks until there is one. Raises torch's `RuntimeError` when the connection
    is lost, `msgspec.DecodeError` for a message of no known form."""
    while True:
        try:
            return messages.decode(store.queue_pop(queue))
        except QueueEmptyError:  # this process was stopped between being woken and reading; `forget` came in between
            continue


def waiting(store: TCPStore, queue: str, messages: Decoder[T]) -> list[T]:
    """All messages in a queue of the publisher's; never blocks. What is of no known form is reported and left out."""
    found: list[T] = []
    for raw in _drain(store, queue):
        try:
            found.append(messages.decode(raw))
        except msgspec.DecodeError as error:
            log.error("weights: a message in the store is not ours: %s", error)
    return found


def forget(store: TCPStore, member: int) -> None:
    """Remove what the store holds about `member`, who learns from it that he was dropped."""
    store.delete_key(member_key(member))
    _drain(store, queue_of(member))


def queue_of(member: int) -> str:
    return f"to/{member}"


def share_queue(share: int) -> str:
    return f"share/{share}"


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
