"""A worker's end of the link."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from protocols.codec import encode
from protocols.link_errors import LinkError, LinkRefused, LinkTimeout
from protocols.link_keys import WorkerKeys, require_keys
from protocols.link_messages import Ack, Goodbye, Heartbeat, Held, Hello, StatusRequest, Welcome
from protocols.link_outbox import size_of
from protocols.link_socket import MAX_MESSAGE_BYTES
from protocols.link_thread import LinkThread, Shared
from protocols.messages import Message

UNACKNOWLEDGED_BYTES = 512 << 20
"""`send` waits while this much is on its way: the buffer, not the worker's memory, sets the pace."""
SEND_TIMEOUT_S = 120.0
GOODBYE_S = 1.0
"""How long `close` waits for the buffer to have heard the goodbye."""

M = TypeVar("M", bound=Message)


class Client:
    """Says hello at once and keeps the connection, or makes it anew, until it is closed or the buffer says goodbye.
    Any thread may call anything."""

    def __init__(
        self,
        address: str,
        hello: Hello,
        *,
        timeout_s: float,
        silence_s: float | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        max_unacknowledged_bytes: int = UNACKNOWLEDGED_BYTES,
        keys: WorkerKeys | None = None,
    ) -> None:
        """A buffer that is silent for `silence_s` (None: five heartbeats, at least 5 s) is dialled anew. Raises
        `LinkTimeout` when no buffer says welcome in time, `LinkRefused` when it refuses this worker or its key,
        `KeysError` for an address beyond this machine without keys, `LinkError` for one that is none."""
        require_keys(keys, address, hello.name)
        self.address, self.hello = address, hello
        self._max_message_bytes, self._max_unacknowledged_bytes = max_message_bytes, max_unacknowledged_bytes
        self._shared = Shared(Heartbeat(state="starts", since=time.time()))
        self._said_goodbye = False
        self._thread = LinkThread(
            address, hello, self._shared, silence_s=silence_s, max_message_bytes=max_message_bytes, keys=keys
        )
        self._thread.start()
        try:
            self._wait(lambda: self._shared.welcome is not None, timeout_s, "a buffer's welcome")
        except BaseException:
            self._said_goodbye = True  # nobody to say it to
            self.close()
            raise

    @property
    def welcome(self) -> Welcome:
        """The latest; a new object after each time the connection was made anew."""
        welcome = self._shared.welcome
        if welcome is None:
            raise LinkError(f"{self.hello.name}: no buffer at {self.address} has said welcome yet")
        return welcome

    @property
    def connected(self) -> bool:
        """The buffer has said welcome on the present connection, and nothing says that it has ended."""
        return self._shared.connected

    @property
    def unacknowledged(self) -> int:
        """Messages that the buffer has not acknowledged yet."""
        return len(self._shared.outbox)

    @property
    def silent_s(self) -> float:
        """Seconds since the buffer was last heard, over however many connections."""
        return time.monotonic() - self._shared.heard

    def status(
        self,
        state: str,
        *,
        version: int | None = None,
        held: Sequence[Held] | None = None,
        counters: dict[str, float] | None = None,
        owes: str = "",
    ) -> None:
        """What the next heartbeats say; what is None stays as it was. `since` moves when `state` changes; `owes` is the role
        that this worker waits for. The first version goes out at once: the buffer waits for it."""
        last = self._shared.beat
        self._shared.beat = Heartbeat(
            state=state,
            since=last.since if state == last.state else time.time(),
            version=last.version if version is None else version,
            held=last.held if held is None else list(held),
            counters=last.counters if counters is None else dict(counters),
            owes=owes,
        )
        if last.version is None and version is not None:
            self._shared.beat_now = True
            self._shared.nudge()

    def send(self, message: Message, timeout_s: float = SEND_TIMEOUT_S) -> int:
        """Queues a message and keeps it until it is acknowledged; returns its id. Its arrays must not change until then.
        Raises `LinkTimeout` when too much stays unacknowledged for too long, `LinkError` when it is too long to send."""
        shared = self._shared
        with shared.changed:
            self._check()
            self._wait(lambda: shared.outbox.bytes < self._max_unacknowledged_bytes, timeout_s, "room to send")
            return self._queue(message)

    def _queue(self, message: Message) -> int:
        shared = self._shared
        with shared.changed:
            frames = encode(message, 0 if isinstance(message, StatusRequest) else shared.last_id + 1)
            if (size := size_of(frames)) > self._max_message_bytes:
                expected = f"expected at most {self._max_message_bytes}"
                raise LinkError(f"{self.hello.name}: {type(message).__name__}: got {size} bytes, {expected}")
            if isinstance(message, StatusRequest):
                shared.unnumbered.append(frames)
            else:
                shared.last_id += 1
                shared.outbox.add(shared.last_id, frames)
            self._said_goodbye |= isinstance(message, Goodbye)
            shared.nudge()
            return shared.last_id

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after `timeout_s`. Acknowledgements are handled inside, except refusals: those come
        as `Ack` with the reason."""
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: shared.inbox or self._ended, timeout_s)
            if shared.inbox:
                return shared.inbox.popleft()
            self._check()
            return None

    def ask(self, message: Message, kind: type[M], timeout_s: float) -> M:
        """Sends, and waits for the first message of this kind; others stay for `receive`. Raises `LinkTimeout`, and
        `LinkRefused` when the buffer refuses the question."""
        deadline = time.monotonic() + timeout_s
        id = self.send(message, timeout_s)
        shared = self._shared

        def answer() -> M | Ack | None:
            for candidate in shared.inbox:
                if isinstance(candidate, kind) or (isinstance(candidate, Ack) and candidate.id == id):
                    return candidate
            return None

        with shared.changed:
            self._wait(lambda: answer() is not None, deadline - time.monotonic(), f"a {kind.__name__}", timeout_s)
            found = answer()
            shared.inbox = type(shared.inbox)(other for other in shared.inbox if other is not found)
        if isinstance(found, kind):
            return found
        reason = found.refused if isinstance(found, Ack) else None
        raise LinkRefused(f"{self.hello.name}: {self.address} refused {type(message).__name__}: {reason}")

    def flush(self, timeout_s: float) -> None:
        """Returns when everything sent is acknowledged. Raises `LinkTimeout`."""
        self._wait(lambda: not self._shared.outbox, timeout_s, "acknowledgements")

    def close(self) -> None:
        """Says goodbye, if nobody has and a buffer is there, and ends the thread; what is unacknowledged stays so."""
        shared = self._shared
        with shared.changed:
            if not self._said_goodbye and shared.connected and shared.over is None:
                self._queue(Goodbye("closed"))
            if shared.connected and shared.over is None:
                shared.changed.wait_for(lambda: not shared.outbox or not shared.connected, GOODBYE_S)
            self._said_goodbye = True
        shared.closing.set()
        shared.nudge()
        self._thread.join(5.0)
        shared.close()

    # --- waiting ------------------------------------------------------------------------------------------------------

    @property
    def _ended(self) -> bool:
        return self._shared.failure is not None or not self._thread.is_alive()

    def _check(self) -> None:
        if self._shared.failure is not None:
            raise self._shared.failure
        if not self._thread.is_alive() and self._shared.over is None:
            raise LinkError(f"{self.hello.name}: the link to {self.address} is closed")

    def _wait(self, done: Callable[[], bool], timeout_s: float, what: str, said_s: float | None = None) -> None:
        """Returns when `done`. Raises `LinkTimeout` naming `what`, or at once what the link has failed with."""
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: done() or self._ended, timeout_s)
            if done():
                return
            self._check()
            waits = f"{self.hello.name}: waited {said_s or timeout_s:.1f} s for {what} from {self.address}"
            if shared.over is not None:
                raise LinkTimeout(f"{waits}, which said goodbye ({shared.over})")
            if shared.trouble and not shared.connected:
                waits += f": {shared.trouble}"
            held = f"; {len(shared.outbox)} messages of {shared.outbox.bytes} bytes are unacknowledged"
            raise LinkTimeout(waits + (held if shared.outbox else ""))
