"""All shares of the newest version as the publisher sees them: its own, and those that the learner's other ranks keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.gathered import Gathered
from engine.weights.keepers import Keepers
from engine.weights.layout import Layout, share_out
from engine.weights.messages import Offer, Send
from engine.weights.patch import PatchLayout
from engine.weights.roster import Member
from engine.weights.share import Share
from engine.weights.staging import Staged
from engine.weights.terms import Terms


@dataclass(frozen=True)
class Plan:
    """How a version is to be shared out: its own part, and the others' layouts."""

    own: Staged
    others: list[Layout]


class Shares:
    """One for each rank of the learner, where there are as many tensors."""

    def __init__(self, own: Share, keepers: Keepers, terms: Terms) -> None:
        self._own, self._keepers, self._terms = own, keepers, terms
        self._sends = 0

    @property
    def version(self) -> int | None:
        """The newest, which lies aside, in part at least."""
        return None if self._own.staged is None else self._own.staged.version

    @property
    def uncompared(self) -> Staged | None:
        """What lies aside beside the version before it, until they are compared."""
        staged = self._own.staged
        return staged if staged is not None and staged.before is not None else None

    @property
    def patches(self) -> list[PatchLayout]:
        """Those of all shares; none where a share has none."""
        own = self._own.staged
        found = [None if own is None or own.patch is None else own.patch.layout]
        found += [kept.patch for kept in self._keepers.kept]
        whole = [patch for patch in found if patch is not None]
        return whole if len(whole) == 1 + self._keepers.count else []

    @property
    def changed(self) -> float:
        """The share of all entries that the newest version changed; 1.0 where there are no patches."""
        own = self._own.staged
        if own is None or own.patch is None or not self.patches:
            return 1.0
        kept = self._keepers.kept
        changed, entries = (
            own.patch.changed + sum(k.changed for k in kept),
            own.patch.entries + sum(k.entries for k in kept),
        )
        return changed / entries

    def plan(self, version: int, tensors: Gathered, fingerprints: Mapping[str, str] | None) -> Plan:
        """Raises `ValueError` where there are no tensors, or fingerprints of others."""
        if fingerprints is not None and set(tensors.like) != set(fingerprints):
            odd = sorted(set(tensors.like) ^ set(fingerprints))[:3]
            raise ValueError(f"weights: tensors and fingerprints differ in names, {odd} among them; expected the same")
        own, *others = share_out(tensors.like, self._terms.ranks)
        return Plan(self._own.staging.plan(version, own, fingerprints), others)

    def copy(self, plan: Plan, tensors: Gathered) -> None:
        """Copy the own share aside, while the other ranks do so with theirs; nothing may be on its way."""
        self._keepers.renew(plan.own.version, plan.others)
        self._own.staged = self._own.staging.copy(plan.own, tensors.items())

    def ready(self) -> bool:
        """Whether all of the newest version lies aside; never blocks."""
        return self._own.staged is not None and self._keepers.ready()

    def offer(self, number: int, patched: bool) -> Offer:
        """The newest version, to a member."""
        own = self._own.staged
        if own is None:
            raise ValueError("weights: there is nothing to offer")
        layouts = [own.layout, *self._keepers.shares]
        return Offer(number, own.version, self._terms.bucket_bytes, layouts, self.patches if patched else [])

    @property
    def cards(self) -> list[str]:
        """The GPUs that the ranks send from; none where one of them has none."""
        found = [self._own.card, *(kept.card for kept in self._keepers.kept)]
        return found if all(found) else []

    def send(self, epoch: int, party: list[Member], live: list[int], moved: Callable[[], None]) -> list[str]:
        """Send all shares at once, each from its rank, to `party`; what the tensors hash to, share after share. `moved` is called
        while bytes move. Raises `TransportError`, once no rank is sending any more."""
        self._sends += 1
        order = Send(self._sends, epoch, len(party) + 1, party[0].nccl, party[0].patched, live)
        self._keepers.tell(order)
        try:
            own = self._own.send(order, moved)
        finally:
            others = self._keepers.wait(order, moved)
        return own + others

    def close(self) -> None:
        """Close all groups of this rank, for good."""
        self._own.close()
        self._keepers.close()
