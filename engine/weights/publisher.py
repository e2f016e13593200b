"""The learner's end: weights are copied aside and broadcast from there while the next step trains."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Mapping

from torch import Tensor

from engine.gathered import Gathered, held
from engine.weights import control
from engine.weights.gate import LOCAL, Relay, open_gate
from engine.weights.groups import Groups
from engine.weights.keepers import Keepers
from engine.weights.messages import TO_PUBLISHER, Check, Failed, Join, Leave, Ready, Refused, ToPublisher
from engine.weights.roster import Member, Roster
from engine.weights.share import Share
from engine.weights.shares import Shares
from engine.weights.staging import Staged
from engine.weights.terms import Terms
from engine.weights.transport import Connect, TransportError, connect
from protocols.closable import Closable

log = logging.getLogger(__name__)

GRACE_S = 2.0
IDLE_POLL_S = 0.02
BUSY_POLL_S = 0.0003


class Publisher(Closable):
    """Sends every version of the weights to whatever subscribers there are at the time.

    One thread keeps the members and broadcasts. A subscriber may join at any time and gets the newest version at
    once, in a group of its own; a group is rebuilt only when the members that are served together changed. A member
    that is silent for `peer_timeout_s`, or on which a group hangs for as long, is dropped and joins again by itself.
    """

    def __init__(
        self,
        host: str,
        terms: Terms,
        *,
        port: int = 0,
        token: str = "",
        connect: Connect = connect,
    ) -> None:
        """Listen on `host`, an address of this machine that subscribers reach (port 0: any free one). With a token only
        who holds it can reach the store. Where the terms name several ranks, the others have a `Keeper` each, whose `keep` is
        called with every `publish`. Raises `OSError` when it cannot listen.
        """
        peer_timeout_s = terms.peer_timeout_s
        self._peer_timeout_s = peer_timeout_s
        self._gate: Relay | None = None
        if token:
            self._store = control.serve_store(LOCAL, 0, peer_timeout_s)
            self._gate = open_gate(host, port, int(self._store.port), token)
        else:
            self._store = control.serve_store(host, port, peer_timeout_s)
        self.address = (host, self._gate.port if self._gate is not None else int(self._store.port))
        """(host, port) that a `Subscriber` is given."""
        self._roster = Roster(peer_timeout_s=peer_timeout_s, grace_s=min(GRACE_S, peer_timeout_s / 2))
        self._groups = Groups(self._store)
        self._share = Share(0, self._store, connect, address=host, terms=terms)
        self._shares = Shares(self._share, Keepers(self._store, silence_s=2 * peer_timeout_s + GRACE_S), terms)
        self._sending = False
        self._closing = False
        self._moved_at = time.monotonic()
        self._changed = threading.Condition()
        self._counters = dict.fromkeys(
            ["published", "bytes", "broadcasts", "broadcast_s", "publish_wait_s", "copy_s", "groups"], 0.0
        ) | dict.fromkeys(["dropped", "refused_updates", "failed_updates", "patches", "patch_s"], 0.0)
        self._thread = threading.Thread(target=self._run, name="weights-publisher", daemon=True)
        self._thread.start()
        atexit.register(
            self.close
        )  # a thread that is in native code while the interpreter ends would abort the process

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start, and `members` now. `bytes` counts a broadcast's payload once, for all its receivers;
        `groups` are those built, `failed_updates` and `refused_updates` count members; `patches` are broadcasts of
        what changed, `patch_s` the time to find it, `changed` the share of entries that the newest version changed (1.0
        where no patch was worth its while)."""
        with self._changed:
            return {**self._counters, "members": float(len(self._roster.members)), "changed": self._shares.changed}

    @property
    def nbytes(self) -> int:
        """What lies aside on this rank, in bytes."""
        with self._changed:
            return self._share.nbytes

    @property
    def members(self) -> dict[str, int | None]:
        """The version that each member is known to hold, by name."""
        with self._changed:
            return {member.name: member.version for member in self._roster.members.values()}

    def publish(
        self,
        version: int,
        tensors: Mapping[str, Tensor] | Gathered,
        *,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Copy `tensors` aside as `version` and return; members get them in the background. Where ranks hold parts, the other
        ranks take part in the gathering, one tensor after another.

        Waits for a broadcast that is under way. `fingerprints` of the same tensors save hashing them again. Raises
        `ValueError` for a version that does not rise or fingerprints of other names, `RuntimeError` when the
        background thread has ended.
        """
        gathered = tensors if isinstance(tensors, Gathered) else held(tensors)
        plan = self._shares.plan(version, gathered, fingerprints)
        started = time.monotonic()
        with self._changed:
            self._wait_until_sent()
            waited = time.monotonic()
            if self._shares.version is not None and version <= self._shares.version:
                raise ValueError(f"weights: got version {version}, expected more than {self._shares.version}")
            self._shares.copy(plan, gathered)
            self._counters["published"] += 1
            self._counters["publish_wait_s"] += waited - started
            self._counters["copy_s"] += time.monotonic() - waited
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Until every member has the newest version verified. Raises `TimeoutError` naming who has not."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (version := self._shares.version) is not None and (behind := self._roster.behind(version)):
                self._check_alive()
                left = deadline - time.monotonic()
                if left <= 0:
                    names = ", ".join(sorted(member.name for member in behind))
                    raise TimeoutError(f"weights: version {version} not at {names} after {timeout_s} s")
                self._changed.wait(min(left, 1.0))

    def close(self) -> None:
        """Stop serving; subscribers see the connection lost. Waits for a broadcast under way, up to its timeout."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._peer_timeout_s + GRACE_S)
        if self._gate is not None:
            self._gate.close()
        if self._thread.is_alive():
            log.error("weights: the publisher's thread still waits for a transport; left behind")
            return
        self._store = None  # the store's server ends with the last reference to it

    # --- the caller's side ---------------------------------------------------------------------------------------

    def _wait_until_sent(self) -> None:
        while self._sending:
            self._check_alive()
            still = time.monotonic() - self._moved_at
            if still > 2 * self._peer_timeout_s + GRACE_S:
                raise RuntimeError(f"weights: waited for a broadcast in which no byte moved for {still:.0f} s")
            self._changed.wait(1.0)
        self._check_alive()

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("weights: the publisher's thread has ended; its error was reported on stderr")

    # --- the background thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    break
                uncompared = self._shares.uncompared
                party = self._turn(time.monotonic()) if uncompared is None else []
                if not party and uncompared is None:
                    self._changed.wait(BUSY_POLL_S if self._expecting() else IDLE_POLL_S)
                    continue
                self._sending, self._moved_at = True, time.monotonic()
            if uncompared is None:
                self._serve(party)
            else:
                self._compare(uncompared)
        self._groups.close()
        self._shares.close()

    def _expecting(self) -> bool:
        published = self._shares.version is not None
        return self._roster.expecting(time.monotonic()) or (published and not self._shares.ready())

    def _turn(self, now: float) -> list[Member]:
        """Hear what members say, drop who is overdue, offer what they lack; who is to be served now."""
        for message in control.waiting(self._store, control.INBOX, TO_PUBLISHER):
            self._hear(message, now)
        for member, reason in self._roster.overdue(now):
            log.warning("weights: %s dropped: %s", member.name, reason)
            self._counters["dropped"] += 1
            del self._roster.members[member.id]
            control.forget(self._store, member.id)
        version = self._shares.version
        if version is None or not self._shares.ready():
            return []
        patches = self._shares.patches
        for member in self._roster.offer(version, now, patches[0].base if patches else None, self._shares.cards):
            offer = self._shares.offer(member.offer, member.patched)
            control.send(self._store, control.queue_of(member.id), offer)
        return self._roster.party(version, now)

    def _hear(self, message: ToPublisher, now: float) -> None:
        if isinstance(message, Join):
            self._roster.join(Member(message.member, message.name, message.version, now, message.card))
            self._changed.notify_all()
            return
        member = self._roster.hear(message, now)
        if member is None:
            return
        match message:
            case Ready() if member.offered_version == self._shares.version:
                if message.nbytes != (expected := self._shares.offer(member.offer, member.patched).nbytes):
                    log.error("weights: %s has room for %d bytes, expected %d", member.name, message.nbytes, expected)
                    self._roster.fail(member, now)
            case Refused():
                self._counters["refused_updates"] += 1
                log.error("weights: %s refused an update: %s", member.name, ", ".join(message.tensors))
            case Failed():
                self._counters["failed_updates"] += 1
                log.warning("weights: %s did not get an update: %s", member.name, message.reason)
            case Leave():
                control.forget(self._store, member.id)
        self._changed.notify_all()

    def _compare(self, staged: Staged) -> None:
        """Find what changed, while nothing is sent and nothing is published."""
        started = time.monotonic()
        staged.make_patch()
        with self._changed:
            self._counters["patch_s"] += time.monotonic() - started
            self._sending = False
            self._changed.notify_all()

    def _serve(self, party: list[Member]) -> None:
        started = time.monotonic()
        nbytes = self._shares.offer(0, party[0].patched).nbytes
        error: TransportError | None = None
        try:
            self._broadcast(party)
        except TransportError as raised:
            error = raised
        with self._changed:
            now = time.monotonic()
            self._counters["groups"] = float(self._groups.built)
            if error is None:
                self._roster.sent(party, now)
                self._counters["broadcasts"] += 1
                self._counters["patches"] += party[0].patched
                self._counters["bytes"] += nbytes
                self._counters["broadcast_s"] += now - started
            else:
                self._give_up(party, error, now)
            self._sending = False
            self._changed.notify_all()

    def _broadcast(self, party: list[Member]) -> None:
        epoch = self._groups.seat(party, self._roster.members.values())
        fingerprints = self._shares.send(epoch, party, self._groups.live, self._moved)
        for member in party:
            control.send(self._store, control.queue_of(member.id), Check(member.offer, fingerprints))

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    def _give_up(self, party: list[Member], error: TransportError, now: float) -> None:
        """A group broke. Its members are asked again, in another group; one that hangs will be dropped."""
        names = ", ".join(member.name for member in party)
        log.warning("weights: update of %s broke off: %s", names, error)
        self._counters["failed_updates"] += len(party)
        for member in party:
            self._roster.fail(member, now)
        self._groups.forget_unused(self._roster.members.values())
