"""The thread of a worker's end of the link. It owns the socket, so heartbeats go out while the worker computes."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import deque

import zmq
from zmq.utils.monitor import parse_monitor_message

from protocols.codec import Malformed, decode, encode
from protocols.link_errors import LinkError, LinkRefused
from protocols.link_keys import WorkerKeys
from protocols.link_messages import Ack, Goodbye, Heartbeat, Hello, Welcome
from protocols.link_outbox import Outbox
from protocols.link_socket import HELLO_FIRST, open_socket
from protocols.messages import Message

CONFIRM_S, CONFIRM_MESSAGES = 0.05, 200
"""What has arrived is confirmed after this time or number, whichever is first."""
BACKOFF_S = (0.05, 5.0)
"""Pause before a connection is made anew: the first, doubling up to the last, less a random half."""
HANDSHAKE_FAILED = (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
CONNECTION_ENDS = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Shared:
    """What the worker and the thread have in common; `changed` guards all of it and tells of every change."""

    def __init__(self, beat: Heartbeat) -> None:
        self.changed = threading.Condition()
        self.outbox = Outbox()
        self.unnumbered: deque = deque()
        """Frames that go out once and are not kept (status requests)."""
        self.inbox: deque[Message] = deque()
        self.last_id = random.SystemRandom().getrandbits(48)
        """Starts anywhere, so that an acknowledgement for another worker of this name settles nothing here."""
        self.beat = beat
        self.beat_now = False
        """The next heartbeat is due, whenever the last was."""
        self.welcome: Welcome | None = None
        self.connected = False
        self.heard = time.monotonic()
        self.over: str | None = None
        """The reason of the buffer's goodbye; after it no connection is made anew."""
        self.failure: LinkError | None = None
        self.trouble = ""
        """Why the last handshake failed, as far as this end can tell."""
        self.closing = threading.Event()
        self._nudged = False
        self._wake, self.woken = socket.socketpair()
        for end in (self._wake, self.woken):
            end.setblocking(False)

    def nudge(self) -> None:
        """There is something for the thread to do."""
        if not self._nudged:
            self._nudged = True
            with contextlib.suppress(OSError):  # a full pipe wakes the thread just as well, a closed one nobody
                self._wake.send(b"\0")

    def drain_nudges(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.woken.recv(64)
        self._nudged = False  # before the outbox is looked at: what comes later nudges again

    def close(self) -> None:
        self._wake.close()
        self.woken.close()


class LinkThread(threading.Thread):
    """Connects, and connects anew, until the worker closes, the buffer has said goodbye or refuses this worker."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        shared: Shared,
        *,
        silence_s: float | None,
        max_message_bytes: int,
        keys: WorkerKeys | None,
    ) -> None:
        super().__init__(name=f"link of {hello.name}", daemon=True)
        self._address, self._hello, self._shared = address, hello, shared
        self._silence_s, self._max_message_bytes, self._keys = silence_s, max_message_bytes, keys
        self._session = random.SystemRandom().randbytes(16).hex().encode()
        self._attempt = 0
        self._stream = 0
        """Which stream of the buffer's `_received` counts in."""
        self._received = self._confirmed = 0
        self._unconfirmed_since: float | None = None

    def run(self) -> None:
        shared, pause_s = self._shared, BACKOFF_S[0]
        context = zmq.Context()
        try:
            while not shared.closing.is_set():
                with open_socket(
                    context, zmq.DEALER, self._address, max_message_bytes=self._max_message_bytes, keys=self._keys
                ) as dealer:
                    if self._serve(dealer):
                        pause_s = BACKOFF_S[0]
                if shared.over is not None or shared.failure is not None:
                    break
                shared.closing.wait(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, BACKOFF_S[1])
        except zmq.ZMQError as error:
            self._fail(LinkError(f"{self._hello.name}: {self._address}: {error.strerror or error}"))
        finally:
            context.term()
            with shared.changed:
                shared.connected = False
                shared.changed.notify_all()

    @property
    def _alive_s(self) -> float:
        """How long the buffer may be silent before it is dialled anew."""
        if self._silence_s is not None:
            return self._silence_s
        return max(5.0, 5 * self._shared.welcome.heartbeat_s) if self._shared.welcome else 5.0

    def _serve(self, dealer: zmq.Socket) -> bool:
        """One connection, until it ends in whatever way; True when the buffer said welcome."""
        shared = self._shared
        self._attempt += 1
        dealer.setsockopt(zmq.IDENTITY, b"%s.%d" % (self._session, self._attempt))
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)  # a connection that ZeroMQ makes anew has lost messages, silently
        monitor = dealer.get_monitor_socket(CONNECTION_ENDS)
        try:
            dealer.connect(self._address)
            self._greet(dealer)
            poller = zmq.Poller()
            for end in (dealer, monitor, shared.woken):
                poller.register(end, zmq.POLLIN)
            welcomed, dialled, beat_at = False, time.monotonic(), 0.0
            while not shared.closing.is_set() and shared.failure is None:
                blocked = shared.connected and not self._send(dealer)
                poller.modify(dealer, zmq.POLLIN | zmq.POLLOUT if blocked else zmq.POLLIN)
                ready = dict(poller.poll(self._wait_ms(beat_at)))
                if shared.woken.fileno() in ready:
                    shared.drain_nudges()
                if dealer in ready:
                    self._receive(dealer)
                if monitor in ready:
                    self._ended(parse_monitor_message(monitor.recv_multipart())["event"])
                    break
                now, beat_s = time.monotonic(), shared.welcome.heartbeat_s if shared.welcome else 1.0
                if now - max(shared.heard, dialled) > self._alive_s:
                    break
                if shared.connected and not welcomed:
                    welcomed, beat_at = True, 0.0
                if shared.connected and (shared.beat_now or now >= beat_at):
                    shared.beat_now = False  # before it is read: what changes later has a heartbeat of its own
                    self._post(dealer, shared.beat)
                    beat_at = now + beat_s
                self._confirm(dealer, now)
            return welcomed
        finally:
            shared.connected = False
            dealer.disable_monitor()
            monitor.close()

    def _ended(self, event: int) -> None:
        """What the end of a connection says about keys. Of a buffer that once knew this one nothing is taken as final."""
        shared = self._shared
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            shared.trouble = "it does not know this worker's key"
            if shared.welcome is None:
                self._fail(LinkRefused(f"{self._hello.name}: {self._address} refused: {shared.trouble}"))
        elif event in HANDSHAKE_FAILED and self._keys is None:
            shared.trouble = "it ended the handshake; it may want keys, and this worker has none"
        elif event in HANDSHAKE_FAILED:
            shared.trouble = "it ended the handshake; it has no keys, or others than this worker's file says"

    def _wait_ms(self, beat_at: float) -> int:
        """Until the next heartbeat, confirmation or look at the clock, whichever is first."""
        wait_s = min(beat_at - time.monotonic(), self._alive_s / 4) if self._shared.connected else self._alive_s / 4
        if self._unconfirmed_since is not None:
            wait_s = min(wait_s, self._unconfirmed_since + CONFIRM_S - time.monotonic())
        return max(0, int(wait_s * 1000) + 1)

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _greet(self, dealer: zmq.Socket) -> None:
        """Hello, with the highest id below which all is settled. Until the welcome nothing else goes out."""
        shared = self._shared
        with shared.changed:
            shared.connected = False
            settled = shared.last_id if (first := shared.outbox.first) is None else first - 1
        self._post(dealer, self._hello, settled)

    def _send(self, dealer: zmq.Socket) -> bool:
        """Everything that waits; False when the pipe is full."""
        shared = self._shared
        while True:
            with shared.changed:
                numbered = not shared.unnumbered
                frames = shared.outbox.next() if numbered else shared.unnumbered[0]
            if frames is None:
                return True
            try:
                dealer.send_multipart(frames, zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            with shared.changed:
                if numbered:
                    shared.outbox.sent()
                else:
                    shared.unnumbered.popleft()

    def _post(self, dealer: zmq.Socket, message: Message, id: int = 0) -> None:
        """Sends once, if the pipe takes it; of a heartbeat that it does not take there will be another."""
        with contextlib.suppress(zmq.Again):
            dealer.send_multipart(encode(message, id), zmq.NOBLOCK)

    def _confirm(self, dealer: zmq.Socket, now: float) -> None:
        """Not before the welcome: until then the count may be of a stream that the buffer has forgotten."""
        since = self._unconfirmed_since
        if since is None or not self._shared.connected:
            return
        if now - since >= CONFIRM_S or self._received - self._confirmed >= CONFIRM_MESSAGES:
            self._post(dealer, Ack(self._received))
            self._confirmed, self._unconfirmed_since = self._received, None

    # --- what comes in ------------------------------------------------------------------------------------------------

    def _receive(self, dealer: zmq.Socket) -> None:
        shared = self._shared
        while shared.failure is None:
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            shared.heard = time.monotonic()
            try:
                id, message = decode([frame.buffer for frame in frames])
            except Malformed as error:
                text = f"{self._hello.name}: what {self._address} sends is not of this protocol: {error}"
                self._fail(LinkRefused(text) if error.reason == "version" else LinkError(text))
                return
            if isinstance(message, Welcome):
                self._welcome(id, message)
            elif id:
                self._numbered(dealer, id, message)
            else:
                self._take(dealer, message)

    def _numbered(self, dealer: zmq.Socket, id: int, message: Message) -> None:
        """A message of the buffer's stream; one that came over an earlier connection already is dropped."""
        if not self._shared.connected or id <= self._received:
            return
        self._received = id
        if self._unconfirmed_since is None:
            self._unconfirmed_since = time.monotonic()
        self._take(dealer, message)

    def _take(self, dealer: zmq.Socket, message: Message) -> None:
        shared = self._shared
        match message:
            case Ack(refused=reason) if reason == HELLO_FIRST:
                if shared.connected and shared.over is None:
                    self._greet(dealer)
            case Ack(refused=str(reason)) if not shared.connected:  # nothing but the hello went out
                self._fail(LinkRefused(f"{self._hello.name}: {self._address} refused: {reason}"))
            case Ack():
                with shared.changed:
                    shared.outbox.settle_run(message.id, message.count)
                    if message.refused is not None:
                        shared.inbox.append(message)
                    shared.changed.notify_all()
            case Goodbye(reason):
                self._post(dealer, Goodbye("the buffer said goodbye"))
                with shared.changed:
                    shared.over = reason
                    shared.inbox.append(message)
                    shared.changed.notify_all()
            case _:
                with shared.changed:
                    shared.inbox.append(message)
                    shared.changed.notify_all()

    def _welcome(self, stream: int, welcome: Welcome) -> None:
        """Connected, for the first time or anew: everything that is not settled goes out (again)."""
        shared = self._shared
        if stream != self._stream:
            self._stream, self._received, self._confirmed, self._unconfirmed_since = stream, 0, 0, None
        with shared.changed:
            if shared.welcome is not None and welcome.weights is not None:
                shared.inbox.append(welcome.weights)
            shared.welcome = welcome
            shared.outbox.rewind()
            shared.connected = True
            shared.changed.notify_all()

    def _fail(self, failure: LinkError) -> None:
        with self._shared.changed:
            self._shared.failure = failure
            self._shared.changed.notify_all()
