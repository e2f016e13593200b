"""The publisher's process groups: one for each set of members that is served together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed import TCPStore

from engine.weights.control import Take, queue_of, send
from engine.weights.roster import Member
from engine.weights.transport import Connect, Seat, Transport, TransportError

log = logging.getLogger(__name__)


@dataclass
class Group:
    """A transport and the members at its ranks 1, 2, ..."""

    members: tuple[int, ...]
    transport: Transport


class Groups:
    """Builds a group when the members that are served together changed, keeps it otherwise; counts in `built`."""

    def __init__(self, store: TCPStore, connect: Connect, *, host: str, device: torch.device, timeout_s: float) -> None:
        self._store, self._connect = store, connect
        self._host, self._device, self._timeout_s = host, device, timeout_s
        self._groups: dict[int, Group] = {}
        self.built = 0

    def seat(self, party: list[Member], everybody: Iterable[Member]) -> Transport:
        """Tell each of `party` to take its offer at its rank; the transport to send it with. Raises `TransportError`."""
        members = tuple(member.id for member in party)
        epoch = party[0].epoch
        group = self._groups.get(epoch)
        if group is not None and (group.members != members or any(member.epoch != epoch for member in party)):
            group = None
        if group is None:
            self.built += 1
            epoch = self.built
        for rank, member in enumerate(party, 1):
            member.epoch = epoch
            send(self._store, queue_of(member.id), Take(member.offer, epoch, rank, len(party) + 1))
        if group is None:
            self.close_unused(everybody)
            seat = Seat(epoch, 0, len(party) + 1, self._host, self._device, self._timeout_s)
            group = self._groups[epoch] = Group(members, self._connect(self._store.clone(), seat))
        return group.transport

    def close_unused(self, everybody: Iterable[Member]) -> None:
        """Close the groups that a member has left, and remove the traces of closed ones from the store."""
        epochs = {member.id: member.epoch for member in everybody}
        for epoch, group in list(self._groups.items()):
            if any(epochs.get(member) != epoch for member in group.members):
                _close(self._groups.pop(epoch))
        for key in self._store.list_keys():
            root, _, rest = key.partition("/")
            if root == "group" and int(rest.partition("/")[0]) not in {*self._groups, self.built}:
                self._store.delete_key(key)

    def close(self) -> None:
        """Close all groups, for good."""
        for group in self._groups.values():
            _close(group)
        self._groups.clear()
        self._store = None


def _close(group: Group) -> None:
    try:
        group.transport.close()
    except TransportError as error:
        log.warning("weights: %s", error)
