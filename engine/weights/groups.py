"""Which members receive together: the publisher's groups, by their epochs."""

from __future__ import annotations

from collections.abc import Iterable

from torch.distributed import TCPStore

from engine.weights.control import queue_of, send
from engine.weights.messages import Take
from engine.weights.roster import Member


class Groups:
    """Members that are served together again stay in their groups (one for each share); others get new ones, under the next
    epoch. Counts the epochs in `built`."""

    def __init__(self, store: TCPStore) -> None:
        self._store = store
        self._groups: dict[int, tuple[tuple[int, ...], bool]] = {}
        """By epoch: the members, and whether they are served over NCCL."""
        self.built = 0

    @property
    def live(self) -> list[int]:
        """The epochs whose groups are of use."""
        return list(self._groups)

    def seat(self, party: list[Member], everybody: Iterable[Member]) -> int:
        """Tell each of `party` to take its offer at its rank; the epoch. Groups that a member has left by that are `live` no more."""
        group = tuple(member.id for member in party), party[0].nccl
        epoch = party[0].epoch
        new = self._groups.get(epoch) != group or any(member.epoch != epoch for member in party)
        if new:
            self.built += 1
            epoch = self.built
        for rank, member in enumerate(party, 1):
            member.epoch = epoch
            send(self._store, queue_of(member.id), Take(member.offer, epoch, rank, len(party) + 1, member.nccl))
        self._groups[epoch] = group
        if new:
            self.forget_unused(everybody)
        return epoch

    def forget_unused(self, everybody: Iterable[Member]) -> None:
        """Forget the groups that a member has left, and remove the traces of such from the store."""
        epochs = {member.id: member.epoch for member in everybody}
        for epoch, (members, _) in list(self._groups.items()):
            if any(epochs.get(member) != epoch for member in members):
                del self._groups[epoch]
        for key in self._store.list_keys():
            root, _, rest = key.partition("/")
            if root == "group" and int(rest.partition("/")[0]) not in {*self._groups, self.built}:
                self._store.delete_key(key)

    def close(self) -> None:
        """Let go of the store, for good."""
        self._store = None
