"""The buffer's end of the link."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import msgspec
import zmq
from msgspec import Struct

from protocols.codec import Malformed, decode, encode
from protocols.link_errors import LinkError
from protocols.messages import Ack, Goodbye, Heartbeat, Hello, Message, StatusRequest, Welcome

HELLO_FIRST = "say hello first"
"""The refusal that makes a client introduce itself anew: this buffer does not know it (any more)."""
BATCH = 2000
"""Messages handed out by one poll at most, so that the owner commits them in one transaction of bounded size."""
STRIKES = 100
"""A peer that sent this many messages that are none is not answered or decoded any more."""


class Joined(Struct, frozen=True):
    """A worker said hello; said again by the same worker it means that the link to it was made anew."""

    worker: str
    hello: Hello


class Received(Struct, frozen=True):
    """A message; acknowledge its id once what it says is durable (heartbeats and status requests want none)."""

    worker: str
    id: int
    message: Message


class Left(Struct, frozen=True):
    """A worker is gone: it said goodbye, was replaced, or was silent for too long."""

    worker: str
    reason: str


Event = Joined | Received | Left


@dataclass(slots=True)
class _Peer:
    identity: bytes
    heard: float


class Server:
    """Binds at once. One thread only."""

    def __init__(
        self, address: str, *, heartbeat_s: float, peer_timeout_s: float, max_message_bytes: int = 1 << 30
    ) -> None:
        """Raises `LinkError` when the address cannot be bound."""
        self.welcome = Welcome(run="", heartbeat_s=heartbeat_s, step=0)
        self.counters: Counter[str] = Counter()
        self._peer_timeout_s = peer_timeout_s
        self._peers: dict[str, _Peer] = {}
        self._names: dict[bytes, str] = {}
        self._strikes: Counter[bytes] = Counter()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        # No water mark: what is sent to a worker is bounded by its credit, what it sends by its unacknowledged limit.
        self._socket.set_hwm(0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"bind {address}: {error.strerror or error}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, waiting up to `timeout_s` for the first of it."""
        events: list[Event] = []
        if self._socket.poll(int(timeout_s * 1000)):
            while len(events) < BATCH:
                try:
                    identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                events += self._take(identity.bytes, [frame.buffer for frame in frames])
        now = time.monotonic()
        for worker, peer in list(self._peers.items()):
            if now - peer.heard > self._peer_timeout_s:
                events.append(self._forget(worker, f"silent for {now - peer.heard:.0f} s"))
        return events

    def send(self, worker: str, message: Message) -> bool:
        """Queues a message; False when the worker is gone (its leases then run out)."""
        peer = self._peers.get(worker)
        return peer is not None and self._send(peer.identity, message, 0)

    def ack(self, worker: str, id: int, refused: str | None = None) -> None:
        """What message `id` said is durable, or refused for this reason."""
        if refused is not None:
            self.counters["refused"] += 1
        self.send(worker, Ack(id, refused))

    def close(self) -> None:
        """Closes the socket; what was not yet written out is lost, and re-sent by nobody."""
        self._socket.close()
        self._context.term()

    def _take(self, identity: bytes, frames: list[memoryview]) -> list[Event]:
        self.counters["messages"] += 1
        if self._strikes[identity] >= STRIKES:
            self.counters["ignored"] += 1
            return []
        try:
            id, message = decode(frames)
        except Malformed as error:
            self.counters["malformed"] += 1
            self._strikes[identity] += 1
            self._send(identity, Ack(error.id, str(error)), error.id)
            return []
        if isinstance(message, Hello):
            return self._greet(identity, message)
        worker = self._names.get(identity)
        if worker is None:
            self._send(identity, Ack(id, HELLO_FIRST), id)
            return []
        self._peers[worker].heard = time.monotonic()
        match message:
            case Goodbye(reason):
                self.ack(worker, id)
                return [self._forget(worker, reason)]
            case Heartbeat():
                self._send(identity, Ack(0), 0)
            case StatusRequest():
                id = 0
        return [Received(worker, id, message)]

    def _greet(self, identity: bytes, hello: Hello) -> list[Event]:
        events: list[Event] = []
        known = self._peers.get(hello.name)
        if known is not None and known.identity != identity:
            self._send(known.identity, Goodbye(f"replaced: another worker said hello as {hello.name}"), 0)
            events.append(self._forget(hello.name, "replaced by another worker of this name"))
        self._peers[hello.name] = _Peer(identity, time.monotonic())
        self._names[identity] = hello.name
        self._send(identity, msgspec.structs.replace(self.welcome), 0)
        return [*events, Joined(hello.name, hello)]

    def _forget(self, worker: str, reason: str) -> Left:
        peer = self._peers.pop(worker)
        self._names.pop(peer.identity, None)
        self._strikes.pop(peer.identity, None)
        return Left(worker, reason)

    def _send(self, identity: bytes, message: Message, id: int) -> bool:
        try:
            self._socket.send_multipart([identity, *encode(message, id)], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError:  # host unreachable: the peer's connection is gone
            self.counters["undeliverable"] += 1
            return False
        return True
