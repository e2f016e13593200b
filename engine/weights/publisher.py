"""The learner's end: weights are copied aside and broadcast from there while the next step trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from engine.weights import control
from engine.weights.control import Check, Failed, Join, Offer, Refused, Reject, Take, ToPublisher
from engine.weights.layout import Digests, Layout, layout_of
from engine.weights.roster import Member, Roster
from engine.weights.transport import Connect, Seat, Transport, TransportError, backend_of, connect, transfer

log = logging.getLogger(__name__)

BUCKET_BYTES = 32 << 20
GRACE_S = 2.0
IDLE_POLL_S = 0.02
BUSY_POLL_S = 0.001


@dataclass
class Staged:
    """The newest weights, aside. `fingerprints` come with them, or from the first broadcast."""

    version: int
    layout: Layout
    flat: Tensor
    fingerprints: list[str] | None


@dataclass
class Group:
    """A transport and the members at its ranks 1, 2, ..."""

    members: tuple[int, ...]
    transport: Transport


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
        connect: Connect = connect,
    ) -> None:
        """Listen on `host`, an address of this machine that subscribers reach (port 0: any free one).

        `device` is where weights are staged: "cpu" goes over gloo, "cuda" over NCCL (subscribers must have the same,
        and a GPU each that is not the learner's). Raises `OSError` when it cannot listen.
        """
        if bucket_bytes < 1 or peer_timeout_s <= 0:
            raise ValueError(f"weights: got bucket_bytes {bucket_bytes}, peer_timeout_s {peer_timeout_s}; expected > 0")
        self._host, self._device, self._connect = host, torch.device(device), connect
        self._bucket_bytes, self._peer_timeout_s = bucket_bytes, peer_timeout_s
        self._store = control.serve_store(host, port, peer_timeout_s)
        self._roster = Roster(peer_timeout_s=peer_timeout_s, grace_s=min(GRACE_S, peer_timeout_s / 2))
        self._groups: dict[int, Group] = {}
        self._epoch = 0
        self._staged: Staged | None = None
        self._sending = False
        self._closing = False
        self._moved_at = time.monotonic()
        self._changed = threading.Condition()
        self._counters = dict.fromkeys(
            ["published", "bytes", "broadcasts", "broadcast_s", "publish_wait_s", "copy_s", "dropped"], 0.0
        ) | {"refused_updates": 0.0, "failed_updates": 0.0, "groups": 0.0}
        self._thread = threading.Thread(target=self._run, name="weights-publisher", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) that a `Subscriber` is given."""
        return self._host, self._store.port

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start (`bytes` of payload leave once a broadcast, however many receive it), and `members`."""
        with self._changed:
            return {**self._counters, "members": float(len(self._roster.members))}

    @property
    def members(self) -> dict[str, int | None]:
        """The version that each member is known to hold, by name."""
        with self._changed:
            return {member.name: member.version for member in self._roster.members.values()}

    def publish(
        self, version: int, tensors: Mapping[str, Tensor], *, fingerprints: Mapping[str, str] | None = None
    ) -> None:
        """Copy `tensors` aside as `version` and return; members get them in the background.

        Waits for a broadcast that is under way. `fingerprints` of the same tensors save hashing them again. Raises
        `ValueError` for a version that does not rise or fingerprints of other names, `RuntimeError` when the
        background thread has ended.
        """
        layout = layout_of(tensors)
        given = None if fingerprints is None else _in_order(layout, fingerprints)
        started = time.monotonic()
        with self._changed:
            self._wait_until_sent()
            waited = time.monotonic()
            if self._staged is not None and version <= self._staged.version:
                raise ValueError(f"weights: got version {version}, expected more than {self._staged.version}")
            self._staged = Staged(version, layout, self._copy_aside(layout, tensors), given)
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
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(self._peer_timeout_s + GRACE_S)
        if self._thread.is_alive():
            log.error("weights: the publisher's thread still waits for a transport; left behind")

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

    def _copy_aside(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
        flat = None if self._staged is None else self._staged.flat
        if flat is None or flat.numel() != layout.nbytes:
            flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self._device)
        with torch.no_grad():
            for name, view in layout.views(flat).items():
                view.copy_(tensors[name])
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()
        return flat

    # --- the background thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    break
                party = self._turn(time.monotonic())
                if not party:
                    self._changed.wait(IDLE_POLL_S if self._settled() else BUSY_POLL_S)
                    continue
                self._sending, self._moved_at = True, time.monotonic()
            self._serve(party)
        for group in self._groups.values():
            _close(group)
        self._groups.clear()

    def _turn(self, now: float) -> list[Member]:
        """Hear what members say, drop who is overdue, offer what they lack; who is to be served now."""
        for message in control.drain(self._store, control.INBOX, ToPublisher):
            self._hear(message, now)
        for member, reason in self._roster.overdue(now):
            log.warning("weights: %s dropped: %s", member.name, reason)
            self._counters["dropped"] += 1
            del self._roster.members[member.id]
            control.forget(self._store, member.id)
        if self._staged is None:
            return []
        for member in self._roster.offer(self._staged.version, now):
            offer = Offer(member.offer, self._staged.version, self._bucket_bytes, self._staged.layout)
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
            case Refused():
                self._counters["refused_updates"] += 1
                log.error("weights: %s refused an update: %s", member.name, ", ".join(message.tensors))
            case Failed():
                self._counters["failed_updates"] += 1
                log.warning("weights: %s did not get an update: %s", member.name, message.reason)
            case control.Leave():
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

    def _settled(self) -> bool:
        return self._staged is None or not self._roster.behind(self._staged.version)

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
            if error is None:
                self._roster.sent(party, now)
                self._counters["broadcasts"] += 1
                self._counters["bytes"] += staged.layout.nbytes
                self._counters["broadcast_s"] += now - started
            else:
                self._give_up(party, error, now)
            self._sending = False
            self._changed.notify_all()

    def _broadcast(self, staged: Staged, party: list[Member]) -> None:
        transport = self._seated(party)
        digests = Digests(staged.layout) if staged.fingerprints is None else None
        for bucket in transfer(transport, staged.flat, self._bucket_bytes):
            self._moved_at = time.monotonic()
            if digests is not None:
                digests.feed(bucket)
        if digests is not None:
            staged.fingerprints = digests.result()
        for member in party:
            control.send(self._store, control.queue_of(member.id), Check(member.offer, staged.fingerprints or []))

    def _seated(self, party: list[Member]) -> Transport:
        """Tell each member its rank; the transport of the group of exactly these, built when it is not there."""
        members = tuple(member.id for member in party)
        epoch = party[0].epoch
        known = self._groups.get(epoch)
        new = known is None or known.members != members or any(member.epoch != epoch for member in party)
        if new:
            self._epoch += 1
            epoch = self._epoch
        for rank, member in enumerate(party, 1):
            member.epoch = epoch
            control.send(self._store, control.queue_of(member.id), Take(member.offer, epoch, rank, len(party) + 1))
        if not new and known is not None:
            return known.transport
        self._close_unused()
        seat = Seat(epoch, 0, len(party) + 1, self._host, self._device, self._peer_timeout_s)
        self._groups[epoch] = Group(members, self._connect(self._store.clone(), seat))
        self._counters["groups"] += 1
        return self._groups[epoch].transport

    def _give_up(self, party: list[Member], error: TransportError, now: float) -> None:
        """A group broke. Its members are asked again, in another group; one that hangs will be dropped."""
        names = ", ".join(member.name for member in party)
        log.warning("weights: update of %s broke off: %s", names, error)
        self._counters["failed_updates"] += len(party)
        for member in party:
            self._roster.fail(member, now)
        self._close_unused()

    def _close_unused(self) -> None:
        """Close groups to which no member belongs any more, and remove their traces from the store."""
        used = {member.epoch for member in self._roster.members.values()}
        for epoch in [epoch for epoch in self._groups if epoch not in used]:
            _close(self._groups.pop(epoch))
        for key in self._store.list_keys():
            epoch_text = key.removeprefix("/").split("/")[1] if key.removeprefix("/").startswith("group/") else ""
            if epoch_text and int(epoch_text) not in self._groups and int(epoch_text) != self._epoch:
                self._store.delete_key(key.removeprefix("/"))


def _close(group: Group) -> None:
    try:
        group.transport.close()
    except TransportError as error:
        log.warning("weights: %s", error)


def _in_order(layout: Layout, fingerprints: Mapping[str, str]) -> list[str]:
    names = [entry.name for entry in layout.entries]
    if set(names) != set(fingerprints):
        odd = sorted(set(names) ^ set(fingerprints))[:3]
        raise ValueError(f"weights: tensors and fingerprints differ in names, {odd} among them; expected the same")
    return [fingerprints[name] for name in names]
