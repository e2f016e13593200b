"""The generator's end: updates arrive in the background and become visible only once every tensor is verified."""

from __future__ import annotations

import atexit
import logging
import threading
import time

import msgspec
from torch.distributed import TCPStore

from engine.devices import card_of, exact_device
from engine.weights import control
from engine.weights.gate import Entrance
from engine.weights.incoming import Incoming, NotHeld, make_room
from engine.weights.layout import weights_hash
from engine.weights.messages import (
    TO_MEMBER,
    Beat,
    Check,
    Done,
    Dropped,
    Failed,
    Join,
    Leave,
    Offer,
    Ready,
    Refused,
    Stop,
    Take,
    ToMember,
    ToPublisher,
)
from engine.weights.place import Place
from engine.weights.transport import Connect, TransportError, connect
from engine.weights.update import Shelf, Update
from protocols.closable import Closable

log = logging.getLogger(__name__)


class Subscriber(Closable):
    """Receives the versions of a `Publisher`, as many as it can keep up with, newest last.

    Two threads: one receives, one beats, so that the learner and this end each know that the other lives. When the
    learner drops this member (it was stopped, say) it joins again by itself. When the learner itself is gone,
    `alive` turns False for good and `error` says why; make a new Subscriber then.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        name: str,
        device: str = "cpu",
        timeout_s: float = 60.0,
        token: str = "",
        given_up: threading.Event | None = None,
        connect: Connect = connect,
    ) -> None:
        """Join the publisher at `host:port`, which may ask for a `token`. Whoever sets `given_up` calls the attempt off.

        `device` is where updates lie. From a learner on GPUs they come over NCCL to a GPU that neither the learner nor a member
        before this one uses, else over gloo. Raises `ConnectionError` when nobody answers within `timeout_s`, or once it is
        called off."""
        self._host, self._port, self._name, self._timeout_s = host, port, name, timeout_s
        self._device = exact_device(device)
        self._entrance = Entrance(host, port, token, timeout_s=timeout_s, given_up=given_up or threading.Event())
        self._store = self._entrance.store
        self._beat_store = self._store.clone()
        self._place = Place(
            str(self), connect, address=control.local_address(host, port), device=self._device, timeout_s=timeout_s
        )
        self._shelf = Shelf(self._device)
        self._incoming: Incoming | None = None
        self._error: str | None = None
        self._closing = threading.Event()
        self._asked_at: float | None = None
        self._counters = dict.fromkeys(["received", "bytes", "receive_s", "refused", "failed", "joins"], 0.0)
        self._member = self._join()
        self._store.set_timeout(control.FOREVER)
        self._threads = [
            threading.Thread(target=target, name=f"weights-{what}-{name}", daemon=True)
            for what, target in (("receive", self._receive), ("beat", self._beat))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(
            self.close
        )  # a thread that is in native code while the interpreter ends would abort the process

    @property
    def alive(self) -> bool:
        """False for good once the connection is lost or the learner's store has been silent for `timeout_s`."""
        asked_at = self._asked_at
        if asked_at is not None and (silent := time.monotonic() - asked_at) > self._timeout_s:
            self._fail(f"the store has not answered for {silent:.1f} s")
        return self._error is None

    @property
    def error(self) -> str | None:
        """Why `alive` is False."""
        return self._error

    @property
    def version(self) -> int | None:
        """The newest verified version that was polled or can be."""
        return self._shelf.version

    @property
    def counters(self) -> dict[str, float]:
        """Totals: updates `received` (verified), `refused` (a tensor failed its check), `failed` (transport), ..."""
        return dict(self._counters)

    def poll(self) -> Update | None:
        """The newest verified update that was not handed out yet. Never blocks; older ones are skipped.

        Raises `RuntimeError` while an update handed out before is not released.
        """
        return self._shelf.take()

    def wait(self, timeout_s: float) -> Update:
        """As `poll`, but waits. Raises `TimeoutError`, or `ConnectionError` when the learner is lost."""
        deadline = time.monotonic() + timeout_s
        with self._shelf.changed:
            while (update := self._shelf.take()) is None:
                if not self.alive:
                    raise ConnectionError(f"{self}: {self._error}")
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{self}: no update within {timeout_s} s")
                self._shelf.changed.wait(min(left, 0.2))
            return update

    def close(self) -> None:
        """Leave. Waits for a broadcast under way, up to its timeout."""
        atexit.unregister(self.close)
        self._closing.set()
        deadline = time.monotonic() + self._timeout_s
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                log.error("%s: %s still waits; left behind", self, thread.name)
        self._entrance.close()

    def __str__(self) -> str:
        return f"weights of {self._host}:{self._port} for {self._name}"

    # --- the beat thread -----------------------------------------------------------------------------------------

    def _beat(self) -> None:
        told = 0
        try:
            while not self._closing.wait(min(1.0, self._timeout_s / 4)) and self._error is None:
                member = self._member
                self._asked_at = time.monotonic()  # the time between beats does not count: this process may be stopped
                if self._beat_store.check([control.member_key(member)]):
                    self._say(self._beat_store, Beat(member))
                elif told != member:  # wakes the receiving thread, which blocks on this queue
                    control.send(self._beat_store, control.queue_of(member), Dropped())
                    told = member
                self._asked_at = None
            if self._error is None:
                control.send(self._beat_store, control.queue_of(self._member), Stop())
        except RuntimeError as error:  # torch's errors of a lost store
            self._fail(_first_line(error))

    # --- the receiving thread ------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            while self._error is None and not self._closing.is_set():
                self._obey(control.receive(self._store, control.queue_of(self._member), TO_MEMBER))
            if self._error is None:
                self._say(self._store, Leave(self._member))
        except (RuntimeError, msgspec.DecodeError) as error:  # torch's errors of a lost store; a foreign message
            self._fail(_first_line(error))
        finally:
            self._fail("the receiving thread has ended")
            self._place.leave()

    def _obey(self, message: ToMember) -> None:
        match message:
            case Offer():
                self._prepare(message)
            case Take():
                self._take(message)
            case Check():
                self._check(message)
            case Dropped():
                log.warning("%s: dropped by the learner; joining again", self)
                self._place.leave()
                self._member = self._join()
            case Stop():
                pass  # it has served to wake this thread

    def _join(self) -> int:
        self._incoming = None
        member: int = self._store.add("joins", 1)
        self._store.set(control.member_key(member), self._name)
        self._say(self._store, Join(member, self._name, card_of(self._device), self._shelf.version))
        self._counters["joins"] += 1
        return member

    def _prepare(self, offer: Offer) -> None:
        try:
            incoming = make_room(offer, self._shelf, self._device)
        except NotHeld as error:
            self._fail_offer(offer.offer, str(error))
            return
        self._say(self._store, Ready(self._member, offer.offer, sum(payload.numel() for payload in incoming.payloads)))
        self._incoming = incoming

    def _take(self, take: Take) -> None:
        incoming = self._incoming
        if incoming is None or incoming.offer.offer != take.offer:
            return
        started = time.monotonic()
        try:
            incoming.receive(self._place.take(self._store, take, len(incoming.payloads)), self._shelf)
        except (TransportError, ValueError) as error:
            self._place.leave()
            self._fail_offer(take.offer, f"version {incoming.offer.version}: {error}")
            return
        self._counters["bytes"] += incoming.offer.nbytes
        self._counters["receive_s"] += time.monotonic() - started

    def _fail_offer(self, offer: int, reason: str) -> None:
        log.warning("%s: %s", self, reason)
        self._counters["failed"] += 1
        self._incoming = None
        self._say(self._store, Failed(self._member, offer, reason))

    def _check(self, check: Check) -> None:
        incoming = self._incoming
        if incoming is None or incoming.offer.offer != check.offer:
            return
        if incoming.fingerprints is None or incoming.flat is None:
            return
        self._incoming = None
        version, names = incoming.offer.version, incoming.offer.names
        found = dict(zip(names, incoming.fingerprints, strict=True))
        wrong = [name for name, expected in zip(names, check.fingerprints, strict=True) if found[name] != expected]
        if wrong:
            log.error("%s: version %d refused: %s failed the check", self, version, ", ".join(wrong))
            self._counters["refused"] += 1
            self._place.leave()
            self._say(self._store, Refused(self._member, check.offer, wrong))
            return
        self._shelf.put(version, incoming.tensors(), hash=weights_hash(found), flat=incoming.flat)
        self._counters["received"] += 1
        self._say(self._store, Done(self._member, check.offer))

    def _say(self, store: TCPStore, message: ToPublisher) -> None:
        control.send(store, control.INBOX, message)

    def _fail(self, reason: str) -> None:
        with self._shelf.changed:
            if self._error is None:
                self._error = reason
                if not self._closing.is_set():
                    log.error("%s: lost: %s", self, reason)
            self._shelf.changed.notify_all()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
