"""Who receives weights, and who is to be served next: states in, decisions out. No sockets, no clock of its own."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from engine.weights.messages import Beat, Done, Failed, Leave, Ready, Refused

ALONE_AFTER = 2
"""Failures after which a member is served on its own, so that it cannot spoil the update of others again."""
DROP_AFTER = 5
"""Failures after which a member has to join anew."""


@dataclass
class Member:
    """One subscriber as the publisher sees it. Times are seconds of the publisher's monotonic clock."""

    id: int
    name: str
    version: int | None
    heard: float
    card: str = ""
    epoch: int = 0
    offer: int = 0
    offered_version: int = -1
    asked_at: float = math.inf
    ready: bool = False
    patched: bool = False
    nccl: bool = False
    served: bool = False
    failures: int = 0
    retry_at: float = 0.0


class Roster:
    """The members. A member holds a version once it has said that all its tensors are verified.

    Serving it takes an offer, its word that it is ready, the payload, and the checksums. Members that were served
    before go together and first; newcomers form a group of their own and join the others at the next version.
    """

    def __init__(self, *, peer_timeout_s: float, grace_s: float) -> None:
        """`peer_timeout_s`: who is silent, or owes an answer, for longer is dropped. `grace_s`: how long those that
        are ready wait for those that are not; the latter are served a little later."""
        self._peer_timeout_s = peer_timeout_s
        self._grace_s = grace_s
        self._offers = 0
        self.members: dict[int, Member] = {}

    def join(self, member: Member) -> None:
        self.members[member.id] = member

    def hear(self, message: Beat | Ready | Done | Refused | Failed | Leave, now: float) -> Member | None:
        """Take note of `message`; the member it is from, unless unknown or speaking of an offer that is void."""
        member = self.members.get(message.member)
        if member is None:
            return None
        member.heard = now
        match message:
            case Beat():
                return member
            case Leave():
                return self.members.pop(message.member)
        if message.offer != member.offer:
            return None
        member.asked_at = math.inf
        match message:
            case Ready():
                member.ready = True
            case Done():
                member.version, member.offer, member.served = member.offered_version, 0, True
                member.failures = max(0, member.failures - 1)
            case Refused() | Failed():
                self.fail(member, now)
        return member

    def overdue(self, now: float) -> list[tuple[Member, str]]:
        """Whom to drop, and why."""
        found = []
        for member in self.members.values():
            if now - member.heard > self._peer_timeout_s:
                found.append((member, f"silent for {now - member.heard:.1f} s"))
            elif now - member.asked_at > self._peer_timeout_s:
                found.append((member, f"owes an answer for {now - member.asked_at:.1f} s"))
            elif member.failures >= DROP_AFTER:
                found.append((member, f"failed {member.failures} times"))
        return found

    def behind(self, version: int) -> list[Member]:
        """Members that do not hold `version`."""
        return [member for member in self.members.values() if member.version != version]

    def offer(self, version: int, now: float, base: int | None = None, cards: Collection[str] = ()) -> list[Member]:
        """Members that are to be offered `version` now; each has its offer's number set. Where there is a patch of version
        `base`, those that hold `base`, and had no trouble of late, are to be `patched`. Where the learner sends from `cards`,
        those on other cards are to be served over `nccl`."""
        chosen = []
        for member in self.behind(version):
            if member.offer and (member.offered_version == version or member.asked_at < math.inf):
                continue  # it has this offer, or still owes an answer to the one before
            if now >= member.retry_at:
                self._offers += 1
                member.offer, member.offered_version, member.ready = self._offers, version, False
                member.patched = base is not None and member.version == base and not member.failures
                member.nccl = self._by_nccl(member, cards)
                member.asked_at = now
                chosen.append(member)
        return chosen

    def party(self, version: int, now: float) -> list[Member]:
        """Who receives `version` together now, all of them in the same way; nobody while some that have just
        been asked may still answer."""
        if self.expecting(now):
            return []
        ready = [member for member in self.behind(version) if member.ready and member.offered_version == version]
        sound = [member for member in ready if member.failures < ALONE_AFTER]
        chosen = [m for m in sound if m.served] or sound or ready[:1]
        return [m for m in chosen if (m.patched, m.nccl) == (chosen[0].patched, chosen[0].nccl)]

    def _by_nccl(self, member: Member, cards: Collection[str]) -> bool:
        """NCCL wants every process on a card of its own. Who had trouble gets the weights over gloo, which all have."""
        if not cards or not member.card or member.card in cards or member.failures >= ALONE_AFTER:
            return False
        return all(other.card != member.card for other in self.members.values() if other.id < member.id)

    def expecting(self, now: float) -> bool:
        """Whether somebody has been asked so recently that his answer is worth waiting for."""
        return any(now - member.asked_at < self._grace_s for member in self.members.values() if member.asked_at <= now)

    def sent(self, party: list[Member], now: float) -> None:
        """`party` has the payload and the checksums, and owes its verdict."""
        for member in party:
            member.ready, member.asked_at = False, now

    def fail(self, member: Member, now: float) -> None:
        """What `member` was offered has not arrived; it is offered again, later each time."""
        member.epoch, member.offer, member.ready, member.asked_at = 0, 0, False, math.inf
        member.failures += 1
        member.retry_at = now + min(5.0, 0.05 * 4 ** (member.failures - 1))
