"""The learner's end: weights are copied aside and broadcast from there while the next step trains."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engine.gathered import Gathered, held
from engine.weights import control
from engine.weights.control import Check, Failed, Join, Leave, Offer, Ready, Refused, Reject, ToPublisher
from engine.weights.gate import LOCAL, Relay, open_gate
from engine.weights.groups import Groups
from engine.weights.layout import Digests
from engine.weights.roster import Member, Roster
from engine.weights.staging import Staged, Staging
from engine.weights.transport import Connect, TransportError, backend_of, connect, transfer

log = logging.getLogger(__name__)

BUCKET_BYTES = 32 << 20
GRACE_S = 2.0
IDLE_POLL_S = 0.02
BUSY_POLL_S = 0.0003


class Publisher:
    """Sends every version of the weights to whatever subscribers there are at the time.

    One thread keeps the members and broadcasts. A subscriber may join at any time and gets the newest version at
    once, in a group of its own; a group is rebuilt only when the members that are served together changed. A member
    that is silent for `peer_timeout_s`, or on which a group hangs for as long, is dropped and joins again by itself.
    """

    def __init__(
        self,
        host: str,
        port: int = 0,
        *,
        device: str = "cpu",
        bucket_bytes: int = BUCKET_BYTES,
        peer_timeout_s: float = 60.0,
        sparse: bool = False,
        in_host_memory: bool = False,
        token: str = "",
        connect: Connect = connect,
    ) -> None:
        """Listen on `host`, an address of this machine that subscribers reach (port 0: any free one). With a token only
        who holds it can reach the store.

        `device` is where weights are staged: "cpu" goes over gloo, "cuda" over NCCL (subscribers must have the same,
        and a GPU each that is not the learner's); `in_host_memory` they lie on the CPU whatever they go over. `sparse`
        sends a member that holds the version before only what changed, where that is less; it takes a second copy of
        the weights. Raises `OSError` when it cannot listen.
        """
        if bucket_bytes < 1 or peer_timeout_s <= 0:
            raise ValueError(f"weights: got bucket_bytes {bucket_bytes}, peer_timeout_s {peer_timeout_s}; expected > 0")
        self._device = torch.device(device)
        self._bucket_bytes, self._peer_timeout_s = bucket_bytes, peer_timeout_s
        self._gate: Relay | None = None
        if token:
            self._store = control.serve_store(LOCAL, 0, peer_timeout_s)
            self._gate = open_gate(host, port, int(self._store.port), token)
        else:
            self._store = control.serve_store(host, port, peer_timeout_s)
        self.address = (host, self._gate.port if self._gate is not None else int(self._store.port))
        """(host, port) that a `Subscriber` is given."""
        self._roster = Roster(peer_timeout_s=peer_timeout_s, grace_s=min(GRACE_S, peer_timeout_s / 2))
        self._groups = Groups(self._store, connect, host=host, device=self._device, timeout_s=peer_timeout_s)
        self._staging = Staging(torch.device("cpu") if in_host_memory else self._device, sparse=sparse)
        self._staged: Staged | None = None
        self._sending = False
        self._closing = False
        self._moved_at = time.monotonic()
        self._changed = threading.Condition()
        self._counters = dict.fromkeys(
            ["published", "bytes", "broadcasts", "broadcast_s", "publish_wait_s", "copy_s", "groups"], 0.0
        ) | dict.fromkeys(["dropped", "refused_updates", "failed_updates", "patches", "patch_s", "changed"], 0.0)
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
            return {**self._counters, "members": float(len(self._roster.members))}

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
        staged = self._staging.plan(version, gathered.like, fingerprints)
        started = time.monotonic()
        with self._changed:
            self._wait_until_sent()
            waited = time.monotonic()
            if self._staged is not None and version <= self._staged.version:
                raise ValueError(f"weights: got version {version}, expected more than {self._staged.version}")
            self._staged = self._staging.copy(staged, gathered.items())
            self._counters["published"] += 1
            self._counters["publish_wait_s"] += waited - started
            self._counters["copy_s"] += time.monotonic() - waited
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Until every member has the newest version verified. Raises `TimeoutError` naming who has not."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._staged is not None and (behind := self._roster.behind(self._staged.version)):
                self._check_alive()
                left = deadline - time.monotonic()
                if left <= 0:
                    names = ", ".join(sorted(member.name for member in behind))
                    raise TimeoutError(f"weights: version {self._staged.version} not at {names} after {timeout_s} s")
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
        self._store = self._staged = None  # the store's server ends with the last reference to it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
                staged = self._staged if self._staged is not None and self._staged.before is not None else None
                party = self._turn(time.monotonic()) if staged is None else []
                if not party and staged is None:
                    self._changed.wait(BUSY_POLL_S if self._roster.expecting(time.monotonic()) else IDLE_POLL_S)
                    continue
                self._sending, self._moved_at = True, time.monotonic()
            if staged is None:
                self._serve(party)
            else:
                self._patch(staged)
        self._groups.close()

    def _turn(self, now: float) -> list[Member]:
        """Hear what members say, drop who is overdue, offer what they lack; who is to be served now."""
        for message in control.inbox(self._store):
            self._hear(message, now)
        for member, reason in self._roster.overdue(now):
            log.warning("weights: %s dropped: %s", member.name, reason)
            self._counters["dropped"] += 1
            del self._roster.members[member.id]
            control.forget(self._store, member.id)
        if self._staged is None:
            return []
        patch = self._staged.patch
        for member in self._roster.offer(self._staged.version, now, None if patch is None else patch.layout.base):
            how = patch.layout if patch is not None and member.patched else None
            offer = Offer(member.offer, self._staged.version, self._bucket_bytes, self._staged.layout, how)
            control.send(self._store, control.queue_of(member.id), offer)
        return self._roster.party(self._staged.version, now)

    def _hear(self, message: ToPublisher, now: float) -> None:
        if isinstance(message, Join):
            self._admit(message, now)
            return
        member = self._roster.hear(message, now)
        if member is None:
            return
        match message:
            case Ready() if self._staged is not None and member.offered_version == self._staged.version:
                if message.nbytes != (expected := self._staged.payload(member.patched).numel()):
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

    def _admit(self, message: Join, now: float) -> None:
        expected = backend_of(self._device)
        if message.backend != expected:
            reason = f"weights: {message.name} wants {message.backend}, but the learner's device sends over {expected}"
            log.error("%s", reason)
            control.send(self._store, control.queue_of(message.member), Reject(reason))
            return
        self._roster.join(Member(message.member, message.name, message.version, now))
        self._changed.notify_all()

    def _patch(self, staged: Staged) -> None:
        """Find what changed, while nothing is sent and nothing is published."""
        started = time.monotonic()
        share = staged.make_patch()
        with self._changed:
            self._counters["patch_s"] += time.monotonic() - started
            self._counters["changed"] = share
            self._sending = False
            self._changed.notify_all()

    def _serve(self, party: list[Member]) -> None:
        staged = self._staged
        if staged is None:
            return
        started = time.monotonic()
        error: TransportError | None = None
        try:
            self._broadcast(staged, party)
        except TransportError as raised:
            error = raised
        with self._changed:
            now = time.monotonic()
            self._counters["groups"] = float(self._groups.built)
            if error is None:
                self._roster.sent(party, now)
                self._counters["broadcasts"] += 1
                self._counters["patches"] += party[0].patched
                self._counters["bytes"] += staged.payload(party[0].patched).numel()
                self._counters["broadcast_s"] += now - started
            else:
                self._give_up(party, error, now)
            self._sending = False
            self._changed.notify_all()

    def _broadcast(self, staged: Staged, party: list[Member]) -> None:
        transport = self._groups.seat(party, self._roster.members.values())
        patched = party[0].patched
        digests = Digests(staged.layout) if staged.fingerprints is None else None
        for bucket in transfer(transport, staged.payload(patched), self._bucket_bytes):
            self._moved_at = time.monotonic()
            if digests is not None and not patched:
                digests.feed(bucket)
        if digests is not None:
            if patched:
                digests.feed(staged.flat)
            staged.fingerprints = digests.result()
        for member in party:
            control.send(self._store, control.queue_of(member.id), Check(member.offer, staged.fingerprints or []))

    def _give_up(self, party: list[Member], error: TransportError, now: float) -> None:
        """A group broke. Its members are asked again, in another group; one that hangs will be dropped."""
        names = ", ".join(member.name for member in party)
        log.warning("weights: update of %s broke off: %s", names, error)
        self._counters["failed_updates"] += len(party)
        for member in party:
            self._roster.fail(member, now)
        self._groups.close_unused(self._roster.members.values())
