"""The buffer's end of the link."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Sequence

import zmq
from msgspec import structs

from protocols.codec import Frame, Malformed, decode, encode
from protocols.link_entrance import Entrance
from protocols.link_events import Event, Joined, Left, Received
from protocols.link_keys import BufferKeys
from protocols.link_messages import PROTOCOL, Ack, Goodbye, Heartbeat, Hello, StatusRequest, Welcome
from protocols.link_outbox import size_of
from protocols.link_peer import Peer
from protocols.link_rights import FROM_WORKERS, SAID_BY
from protocols.link_socket import HELLO_FIRST, MAX_MESSAGE_BYTES, session_of
from protocols.messages import Message

__all__ = ["STRIKES", "Event", "Joined", "Left", "Received", "Server"]

BATCH, BATCH_BYTES = 2000, 256 << 20
"""What one poll hands out at most, so that the owner commits it in one transaction of bounded size."""
STRIKES = 20
"""A connection on which this many messages were none of this protocol is neither decoded nor answered any more."""
QUEUE_BYTES = 2 * MAX_MESSAGE_BYTES
"""What may wait for one worker; one that takes nothing for so long is given up."""
QUEUE_MESSAGES = 100_000
STRANGERS = 10_000
"""Connections remembered for their strikes, and sessions for having been replaced; the oldest are forgotten first."""
RETRY_S = 0.01
"""How soon a worker whose pipe was full is tried again."""


class Server:
    """Binds at once. One thread only. `counters` counts messages, and refusals by reason."""

    def __init__(
        self,
        address: str,
        *,
        heartbeat_s: float,
        peer_timeout_s: float,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_queue_bytes: int = QUEUE_BYTES,
        keys: BufferKeys | None = None,
    ) -> None:
        """Raises `LinkError` when the address cannot be bound, `KeysError` when it reaches beyond this machine and there
        are no keys. Port 0 takes a free one; `address` then names it."""
        self.welcome = Welcome(run="", heartbeat_s=heartbeat_s, step=0)
        self.counters: Counter[str] = Counter()
        self._peer_timeout_s = peer_timeout_s
        self._max_message_bytes, self._max_queue_bytes = max_message_bytes, max_queue_bytes
        self._peers: dict[str, Peer] = {}
        self._sessions: dict[bytes, Peer] = {}
        self._stuck: set[str] = set()
        self._owing: set[str] = set()
        self._strikes: OrderedDict[bytes, int] = OrderedDict()
        self._replaced: OrderedDict[bytes, str] = OrderedDict()
        self._events: list[Event] = []
        self._entrance = Entrance(
            address,
            peer_timeout_s=peer_timeout_s,
            max_message_bytes=max_message_bytes,
            keys=keys,
            counters=self.counters,
        )
        self.address = self._entrance.address

    def poll(self, timeout_s: float) -> list[Event]:
        """What happened, waiting up to `timeout_s` for the first of it."""
        for worker in list(self._owing):
            self._pay(self._peers[worker])
        wait_s = 0.0 if self._events else min(timeout_s, RETRY_S) if self._stuck else timeout_s
        more = self._entrance.wait(wait_s) and self._drain_socket()
        for worker in list(self._stuck):
            self._push(self._peers[worker])
        if not more:  # what still waits in the socket may be a sign of life
            self._expire()
        events, self._events = self._events, []
        return events

    def send(self, worker: str, message: Message) -> bool:
        """Queues a message until the worker confirms it, over however many connections. False when there is no such
        worker, or when it takes nothing and too much waits for it: then it has left."""
        peer = self._peers.get(worker)
        if peer is None:
            return False
        self._pay(peer)
        return worker in self._peers and self._queue(peer, message)

    def _queue(self, peer: Peer, message: Message) -> bool:
        worker = peer.worker
        frames = encode(message, peer.last + 1)
        waiting = len(peer.outbox), peer.outbox.bytes
        if waiting[0] >= QUEUE_MESSAGES or (waiting[0] and waiting[1] + size_of(frames) > self._max_queue_bytes):
            self.counters["slow"] += 1
            self._forget(peer, f"takes nothing: {waiting[0]} messages of {waiting[1]} bytes wait for it")
            return False
        peer.last += 1
        peer.outbox.add(peer.last, frames)
        if worker not in self._stuck:
            self._push(peer)
        return True

    def ack(self, worker: str, id: int, refused: str | None = None) -> None:
        """What message `id` said is durable, or refused for this reason. It goes out with the next poll at the latest:
        acknowledgements of consecutive ids are one message, for each costs as much as the message it answers."""
        if refused is not None:
            self.counters["refused"] += 1
            self.send(worker, Ack(id, refused))
        elif (peer := self._peers.get(worker)) is not None:
            if not peer.follows(id):
                self._pay(peer)
            peer.owe(id)
            self._owing.add(worker)

    def _pay(self, peer: Peer) -> None:
        """The acknowledgements that the owner has given go out."""
        self._owing.discard(peer.worker)
        if (ack := peer.paid()) is not None:
            self._queue(peer, ack)

    def close(self) -> None:
        """Closes the socket at once; what the workers have not confirmed is lost."""
        self._entrance.close()

    # --- what comes in ----------------------------------------------------------------------------------------------

    def _drain_socket(self) -> bool:
        """Takes what has arrived; True when more may be waiting."""
        count = size = 0
        while count < BATCH and size < BATCH_BYTES:
            try:
                identity, role, frames = self._entrance.receive()
            except zmq.Again:
                return False
            count += 1
            size += size_of(frames)
            self._take(identity, role, frames)
        return True

    def _take(self, identity: bytes, role: str | None, frames: Sequence[Frame]) -> None:
        self.counters["messages"] += 1
        if self._strikes.get(identity, 0) >= STRIKES:
            self.counters["ignored"] += 1
            return
        peer = self._sessions.get(session_of(identity))
        speaks_as = role or (peer.role if peer is not None else None)
        try:
            id, message = decode(frames, FROM_WORKERS if speaks_as is None else SAID_BY[speaks_as])
            if (size := size_of(frames)) > self._max_message_bytes:
                expected = f"expected at most {self._max_message_bytes}"
                raise Malformed(f"{type(message).__name__}: got {size} bytes, {expected}", "size", id)
        except Malformed as error:
            self._strike(identity, error)
            return
        if isinstance(message, Hello):
            self._greet(identity, role, id, message)
            return
        if peer is None:
            self.counters["unknown"] += 1
            self._tell(identity, Ack(0, HELLO_FIRST))
        elif peer.identity != identity:
            self.counters["stale"] += 1  # of an earlier connection: it comes again over the present one
        else:
            peer.heard = time.monotonic()
            self._deliver(peer, id, message)

    def _deliver(self, peer: Peer, id: int, message: Message) -> None:
        match message:
            case Ack():
                peer.outbox.settle_through(message.id)
            case Heartbeat():
                self._tell(peer.identity, Ack(0))
                self._events.append(Received(peer.worker, 0, message))
            case StatusRequest():
                self._events.append(Received(peer.worker, 0, message))
            case Goodbye(reason):
                self._tell(peer.identity, Ack(id))
                self._forget(peer, reason)
            case _ if id <= peer.delivered:
                self.counters["duplicates"] += 1
            case _:
                peer.delivered = id
                self._events.append(Received(peer.worker, id, message))

    def _strike(self, identity: bytes, error: Malformed) -> None:
        """Refuses what is no message of this protocol; the sender is told why, and ignored once it has sent too many."""
        self.counters[f"malformed_{error.reason}"] += 1
        count = self._strikes.pop(identity, 0) + 1
        _remember(self._strikes, identity, count)
        peer = self._sessions.get(session_of(identity))
        if peer is None or peer.identity != identity:
            self._tell(identity, Ack(error.id, str(error)))
        elif count >= STRIKES:
            self._forget(peer, f"sent {count} messages that are none; the last: {error}")
        else:
            peer.delivered = max(peer.delivered, error.id)
            self.ack(peer.worker, error.id, str(error))

    def _greet(self, identity: bytes, role: str | None, id: int, hello: Hello) -> None:
        """`id` is the highest of the worker's ids that is settled, on its side, with whatever buffer it last knew."""
        session = session_of(identity)
        if hello.protocol != PROTOCOL:
            self.counters["malformed_version"] += 1
            self._tell(identity, Ack(id, f"protocol: the buffer speaks {PROTOCOL}, {hello.name} {hello.protocol}"))
            return
        if (reason := self._not_admitted(session, role, hello)) is not None:
            self.counters["not_admitted"] += 1
            self._tell(identity, Ack(id, reason))
            return
        if session in self._replaced:
            self._tell(identity, Goodbye(self._replaced[session]))
            return
        peer = self._sessions.get(session)
        if peer is None or peer.worker != hello.name:
            if peer is not None:
                self._forget(peer, f"calls itself {hello.name} now")
            if (former := self._peers.get(hello.name)) is not None:
                self._replace(former)
            peer = Peer(hello.name, hello.role, session, identity, id, time.monotonic())
            self._peers[hello.name] = self._sessions[session] = peer
        peer.identity, peer.heard = identity, time.monotonic()
        peer.outbox.rewind()
        # Only who takes weights is told where they are: behind the store's token.
        welcome = self.welcome if hello.role == "generator" else structs.replace(self.welcome, weights=None)
        self._tell(identity, welcome, peer.stream)
        self._push(peer)
        self._events.append(Joined(hello.name, hello))

    def _not_admitted(self, session: bytes, role: str | None, hello: Hello) -> str | None:
        """Why this hello is refused: it names another role than its key, or somebody of another role."""
        if role is not None and hello.role != role:
            return f"role: got {hello.role}, but the key of {hello.name} is that of a {role}"
        for known in (self._peers.get(hello.name), self._sessions.get(session)):
            if known is not None and known.role != hello.role:
                return f"role: got {hello.role}, but {known.worker} is a {known.role} here; take another name"
        return None

    # --- who is there -----------------------------------------------------------------------------------------------

    def _replace(self, peer: Peer) -> None:
        """The newer of two workers of a name wins; the older is told, again if it should come back."""
        reason = f"replaced: another worker said hello as {peer.worker}"
        _remember(self._replaced, peer.session, reason)
        self._tell(peer.identity, Goodbye(reason))
        self._forget(peer, "replaced by another worker of this name")

    def _forget(self, peer: Peer, reason: str) -> None:
        del self._peers[peer.worker], self._sessions[peer.session]
        self._stuck.discard(peer.worker)
        self._owing.discard(peer.worker)
        self._events.append(Left(peer.worker, reason))

    def _expire(self) -> None:
        now = time.monotonic()
        for peer in list(self._peers.values()):
            if now - peer.heard > self._peer_timeout_s:
                self._forget(peer, f"silent for {now - peer.heard:.1f} s")

    # --- what goes out ----------------------------------------------------------------------------------------------

    def _push(self, peer: Peer) -> None:
        """Sends what its pipe takes; the rest waits. One whose connection is gone says hello again or falls silent."""
        self._stuck.discard(peer.worker)
        try:
            while (frames := peer.outbox.next()) is not None:
                self._entrance.send(peer.identity, frames, copy=False)
                peer.outbox.sent()
        except zmq.Again:
            self._stuck.add(peer.worker)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counters["unreachable"] += 1

    def _tell(self, identity: bytes, message: Message, id: int = 0) -> None:
        """Sends once, if that is possible now: for what needs no confirmation, or has nobody who could give one."""
        try:
            self._entrance.send(identity, encode(message, id), copy=True)
        except zmq.ZMQError as error:  # EAGAIN: its pipe is full; EHOSTUNREACH: it is gone
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.counters["untold"] += 1


def _remember(table: OrderedDict, key: bytes, value: object) -> None:
    table[key] = value
    if len(table) > STRANGERS:
        table.popitem(last=False)
