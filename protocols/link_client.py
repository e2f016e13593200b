"""A worker's end of the link: a thread that owns the socket, so heartbeats go out while the worker computes."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import TypeVar

import zmq

from protocols.codec import Malformed, decode, encode
from protocols.link_errors import LinkError, LinkRefused, LinkTimeout
from protocols.link_server import HELLO_FIRST
from protocols.messages import Ack, Goodbye, Heartbeat, Held, Hello, Message, StatusRequest, Welcome

UNACKNOWLEDGED_BYTES = 512 << 20
"""`send` waits while this much is on its way: the buffer, not the worker's memory, sets the pace."""
SEND_TIMEOUT_S = 120.0
SILENCE = 5
"""A buffer silent for this many heartbeats is dialled anew."""

M = TypeVar("M", bound=Message)
Frames = list[bytes | memoryview]


class Client:
    """Says hello at once and keeps the connection. Messages may be sent from one thread at a time."""

    def __init__(self, address: str, hello: Hello, *, timeout_s: float) -> None:
        """Raises `LinkTimeout` when no buffer answers in time, `LinkRefused` when it refuses this worker."""
        self.address, self.hello = address, hello
        self.welcome = Welcome(run="", heartbeat_s=2.0, step=0)
        self._identity = f"{hello.name}/{uuid.uuid4().hex}".encode()[:200]
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._kept: deque[Message] = deque()
        self._lock = threading.Condition()
        self._outgoing: deque[tuple[int, Frames]] = deque()
        self._unacknowledged: OrderedDict[int, Frames] = OrderedDict()
        self._bytes = 0
        self._next_id = 1
        self._beat = Heartbeat(state="starts", since=time.time())
        self._welcomed = threading.Event()
        self._closing = threading.Event()
        self._refusal: str | None = None
        self._over = False
        """The buffer has said goodbye: this worker answers with its own and does not introduce itself again."""
        self._heard = time.monotonic()
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=f"link of {hello.name}", daemon=True)
        self._thread.start()
        if not self._welcomed.wait(timeout_s):
            self.close()
            raise LinkTimeout(f"{hello.name}: waited {timeout_s:.0f} s for a buffer's welcome at {address}")
        if self._refusal is not None:
            self.close()
            raise LinkRefused(f"{hello.name}: {address} refused: {self._refusal}")

    # --- for the worker --------------------------------------------------------------------------------------------

    @property
    def unacknowledged(self) -> int:
        """Messages that the buffer has not confirmed yet."""
        return len(self._unacknowledged)

    @property
    def silent_s(self) -> float:
        """Seconds since the buffer was last heard, over however many connections."""
        return time.monotonic() - self._heard

    def status(
        self,
        state: str,
        *,
        version: int | None = None,
        held: Sequence[Held] | None = None,
        counters: dict[str, float] | None = None,
    ) -> None:
        """What the next heartbeats say; what is None stays as it was. `since` moves when `state` changes."""
        last = self._beat
        self._beat = Heartbeat(
            state=state,
            since=last.since if state == last.state else time.time(),
            version=last.version if version is None else version,
            held=last.held if held is None else list(held),
            counters=last.counters if counters is None else dict(counters),
        )

    def send(self, message: Message) -> int:
        """Queues a message and keeps it until it is acknowledged; returns its id. Raises `LinkTimeout` when too much
        is unacknowledged for too long."""
        with self._lock:
            free = self._lock.wait_for(lambda: self._bytes < UNACKNOWLEDGED_BYTES or self._dead, SEND_TIMEOUT_S)
            self._check()
            if not free:
                waited = f"waited {SEND_TIMEOUT_S:.0f} s for room to send"
                raise LinkTimeout(f"{self.hello.name}: {waited}: {self._bytes} bytes unacknowledged by {self.address}")
            id, self._next_id = self._next_id, self._next_id + 1
            frames = encode(message, id)
            if not isinstance(message, StatusRequest | Heartbeat):
                self._unacknowledged[id] = frames
                self._bytes += _size(frames)
            self._outgoing.append((id, frames))
        self._nudge()
        return id

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after `timeout_s`. Acknowledgements are handled inside, except refusals: those come
        as `Ack` with the reason."""
        if self._kept:
            return self._kept.popleft()
        try:
            return self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            self._check()
            return None

    def ask(self, message: Message, kind: type[M], timeout_s: float) -> M:
        """Sends, and waits for the first message of this kind; others stay for `receive`. Raises `LinkTimeout`."""
        self.send(message)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self._inbox.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(answer, kind):
                return answer
            self._kept.append(answer)
        self._check()
        raise LinkTimeout(f"{self.hello.name}: waited {timeout_s:.0f} s for a {kind.__name__} from {self.address}")

    def flush(self, timeout_s: float) -> None:
        """Returns when everything sent is acknowledged. Raises `LinkTimeout`."""
        with self._lock:
            done = self._lock.wait_for(lambda: not self._unacknowledged or self._dead, timeout_s)
            self._check()
            if not done:
                what = f"{len(self._unacknowledged)} acknowledgements"
                raise LinkTimeout(f"{self.hello.name}: waited {timeout_s:.0f} s for {what} from {self.address}")

    def close(self) -> None:
        """Ends the thread; what is unacknowledged stays so."""
        self._closing.set()
        self._nudge()
        self._thread.join(5.0)
        self._wake.close()
        self._woken.close()

    @property
    def _dead(self) -> bool:
        return not self._thread.is_alive()

    def _check(self) -> None:
        if self._refusal is not None:
            raise LinkRefused(f"{self.hello.name}: {self.address} refused: {self._refusal}")
        if self._dead and not self._closing.is_set():
            raise LinkError(f"{self.hello.name}: the link's thread ended")

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):  # a full pipe wakes the thread just as well, a closed one has nobody to wake
            self._wake.send(b"\0")

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        context = zmq.Context()
        try:
            while not self._closing.is_set():
                with context.socket(zmq.DEALER) as dealer:
                    dealer.linger = 200  # a goodbye that was just sent should still get out
                    dealer.set_hwm(0)
                    dealer.setsockopt(zmq.IDENTITY, self._identity)
                    dealer.connect(self.address)
                    self._serve(dealer)
        finally:
            context.term()
            with self._lock:
                self._lock.notify_all()

    def _serve(self, dealer: zmq.Socket) -> None:
        """One connection: until the worker closes, or the buffer has been silent for too long."""
        poller = zmq.Poller()
        poller.register(dealer, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        dialled = time.monotonic()  # `_heard` stays: how long the buffer has been silent does not begin anew
        dealer.send_multipart(encode(self.hello))
        next_beat = time.monotonic() + 0.5
        while True:
            ready = dict(poller.poll(int(max(0.0, next_beat - time.monotonic()) * 1000) + 1))
            if self._woken.fileno() in ready:
                self._drain_nudges()
            if dealer in ready:
                self._receive(dealer)
            while self._outgoing:
                dealer.send_multipart(self._outgoing.popleft()[1], copy=False)
            if self._closing.is_set():
                return
            if time.monotonic() >= next_beat:
                if time.monotonic() - max(self._heard, dialled) > SILENCE * max(1.0, self.welcome.heartbeat_s):
                    return
                dealer.send_multipart(encode(self._beat if self._welcomed.is_set() else self.hello))
                next_beat = time.monotonic() + self.welcome.heartbeat_s

    def _drain_nudges(self) -> None:
        try:
            while self._woken.recv(4096):
                pass
        except BlockingIOError:
            pass

    def _receive(self, dealer: zmq.Socket) -> None:
        while True:
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._heard = time.monotonic()
            try:
                _, message = decode([frame.buffer for frame in frames])
            except Malformed as error:
                self._refuse(f"what it sends is not of this protocol: {error}")
                return
            match message:
                case Welcome():
                    self._welcome(message)
                case Ack(refused=reason) if reason == HELLO_FIRST:
                    if not self._over:
                        dealer.send_multipart(encode(self.hello))
                case Goodbye():
                    self._over = True
                    dealer.send_multipart(encode(Goodbye("the buffer said goodbye")))
                    self._inbox.put(message)
                case Ack(id=0, refused=str(reason)) if not self._welcomed.is_set():
                    self._refuse(reason)
                case Ack():
                    self._acknowledge(message)
                case _:
                    self._inbox.put(message)

    def _welcome(self, welcome: Welcome) -> None:
        """Connected, for the first time or anew: everything unacknowledged goes out again, in order."""
        again = self._welcomed.is_set()
        self.welcome = welcome
        with self._lock:
            if again:
                self._outgoing = deque(self._unacknowledged.items())
        self._welcomed.set()
        if again and welcome.weights is not None:
            self._inbox.put(welcome.weights)

    def _acknowledge(self, ack: Ack) -> None:
        with self._lock:
            frames = self._unacknowledged.pop(ack.id, None)
            if frames is not None:
                self._bytes -= _size(frames)
            self._lock.notify_all()
        if ack.refused is not None:
            self._inbox.put(ack)

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self._closing.set()
        self._welcomed.set()


def _size(frames: Frames) -> int:
    return sum(len(frame) for frame in frames)
