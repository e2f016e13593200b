"""The learner's weights as a generator sees them: found by announcement, reconnected when lost, never waited for.

Connecting and leaving may take as long as a timeout, and preparing an update as long as reading all of it, so these happen
in threads of their own while decoding goes on.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable

from engine.adopt_weights import WeightsRefused
from engine.weights import Subscriber, Update
from protocols.link_messages import Announce

LEARNER_TIMEOUT_S = 1800.0
"""How long a generator goes on without a learner, on the weights that it has or waiting for the first: long enough for
one that was killed to load its checkpoint and come back."""


class LearnerLost(RuntimeError):
    """No learner for `LEARNER_TIMEOUT_S`; says since when, and why the last attempt failed."""


class WeightFeed:
    """`connect` to where the learner is announced, `poll` between decode steps.

    Versions only rise: of a learner that was started anew nothing is taken until it is further than what was taken last.

    `prepare` is called with each update before `poll` returns it, one at a time and never while the owner still has one;
    what it raises (`WeightsRefused`, `FloatingPointError`) comes out of `poll`.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str,
        peer_timeout_s: float,
        learner_timeout_s: float = LEARNER_TIMEOUT_S,
        prepare: Callable[[Update], None] | None = None,
    ) -> None:
        self._name, self._device, self._peer_timeout_s = name, device, peer_timeout_s
        self._learner_timeout_s, self._prepare = learner_timeout_s, prepare
        self._preparing: threading.Thread | None = None
        self._prepared: queue.SimpleQueue[Update | WeightsRefused | FloatingPointError] = queue.SimpleQueue()
        self._where: Announce | None = None
        self._subscriber: Subscriber | None = None
        self._connecting: Announce | None = None
        self._given_up = threading.Event()  # of the attempt under way
        self._made: queue.SimpleQueue[tuple[Announce, Subscriber | ConnectionError]] = queue.SimpleQueue()
        self._version = -1
        self._alone_since = time.monotonic()
        self._trouble = "none was announced by the buffer"
        self.counters: dict[str, float] = {"connects": 0}

    @property
    def waits_for(self) -> str:
        """What is missing as long as no weights have come."""
        if self._subscriber is not None:
            return "the first weights"
        return "a learner" if self._where is None else f"the learner at {self._where.host}:{self._where.port}"

    def connect(self, where: Announce | None) -> None:
        """The learner is at `where`; nothing happens when that is known, or None."""
        if where is None or where == self._where:
            return
        self._where = where
        self._drop("another learner was announced")

    def poll(self) -> Update | None:
        """The newest weights that were not taken yet, prepared; never blocks. Raises `LearnerLost`, and what `prepare`
        raises."""
        if self._preparing is not None:
            return self._take_prepared()
        update = self._receive()
        if update is None:
            return None
        if update.version <= self._version:  # a learner that came back publishes while it re-trains what the log has
            update.release()
            return None
        self._version = update.version
        if self._prepare is None:
            return update
        self._preparing = threading.Thread(target=self._run_prepare, args=[update], name="weights-prepare", daemon=True)
        self._preparing.start()
        return None

    def _take_prepared(self) -> Update | None:
        """The update that is being prepared, once it is; that its learner may be gone meanwhile does not matter."""
        try:
            result = self._prepared.get_nowait()
        except queue.Empty:
            return None
        self._preparing = None
        if isinstance(result, Update):
            return result
        raise result

    def _run_prepare(self, update: Update) -> None:
        assert self._prepare is not None
        try:
            self._prepare(update)
        except (WeightsRefused, FloatingPointError) as error:
            update.release()
            self._prepared.put(error)
        else:
            self._prepared.put(update)

    def _receive(self) -> Update | None:
        self._collect()
        if self._subscriber is not None and not self._subscriber.alive:
            self._say(f"lost the learner: {self._subscriber.error}")
            self._drop(f"{self._subscriber.error}")
        if self._subscriber is not None:
            return self._subscriber.poll()
        alone_s = time.monotonic() - self._alone_since
        if alone_s > self._learner_timeout_s:
            raise LearnerLost(
                f"no learner for {alone_s:.0f} s (limit {self._learner_timeout_s:.0f} s): {self._trouble}"
            )
        if self._where is not None and self._connecting != self._where:
            self._given_up.set()  # the attempt at a learner that is gone; a new one does not wait for its end
            self._connecting, self._given_up = self._where, threading.Event()
            attempt = [self._where, self._given_up]
            threading.Thread(target=self._connect, args=attempt, name="weights-connect", daemon=True).start()
        return None

    def close(self) -> None:
        """Leave; waits a bounded time for the learner to be told, and for an update that is being prepared."""
        self._given_up.set()
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            leaving = self._close_aside(subscriber)
            leaving.join(5.0)
        if self._preparing is not None:
            self._preparing.join(5.0)

    def _connect(self, where: Announce, given_up: threading.Event) -> None:
        try:
            made: Subscriber | ConnectionError = Subscriber(
                where.host,
                where.port,
                name=self._name,
                device=self._device,
                timeout_s=self._peer_timeout_s,
                token=where.token,
                given_up=given_up,
            )
        except ConnectionError as error:
            made = error
        self._made.put((where, made))

    def _collect(self) -> None:
        """Takes over what the connecting thread made, unless the learner moved meanwhile."""
        try:
            where, made = self._made.get_nowait()
        except queue.Empty:
            return
        if where == self._connecting:
            self._connecting = None
        if isinstance(made, ConnectionError):
            if where == self._where:
                self._trouble = str(made)
                self._say(f"no learner there, trying again: {made}")
        elif where != self._where or self._subscriber is not None:
            self._close_aside(made)
        else:
            self._subscriber = made
            self.counters["connects"] += 1

    def _drop(self, why: str) -> None:
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None:
            self._alone_since, self._trouble = time.monotonic(), why
            self._close_aside(subscriber)

    def _close_aside(self, subscriber: Subscriber) -> threading.Thread:
        thread = threading.Thread(target=subscriber.close, name="weights-leave", daemon=True)
        thread.start()
        return thread

    def _say(self, text: str) -> None:
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)
