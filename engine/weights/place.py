"""A subscriber's place in the process groups that send the shares of the weights (`engine.weights.groups`)."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from engine.weights.messages import Take
from engine.weights.transport import Connect, Seat, Transport, TransportError

log = logging.getLogger(__name__)


class Place:
    """Holds the transports of the groups that it was last told to take; `who` it is for, in the log. `address` is this machine's,
    as the other ranks reach it, `device` where NCCL receives."""

    def __init__(self, who: str, connect: Connect, *, address: str, device: torch.device, timeout_s: float) -> None:
        self._who, self._connect = who, connect
        self._address, self._device, self._timeout_s = address, device, timeout_s
        self._transports: list[Transport] = []
        self._epoch = 0

    def take(self, store: TCPStore, take: Take, shares: int) -> list[Transport]:
        """The transports of `take`'s groups, share after share (in the same order for every member, for each is built once all
        its ranks are there): those that are there, or new ones in place of them. Raises `TransportError`."""
        if self._epoch != take.epoch:
            self.leave()
        self._epoch = take.epoch
        while len(self._transports) < shares:
            share = len(self._transports)
            device = self._device if take.nccl else torch.device("cpu")
            seat = Seat(take.epoch, share, take.rank, take.size, self._address, device, self._timeout_s)
            store = store.clone()
            store.set_timeout(timedelta(seconds=self._timeout_s))
            self._transports.append(self._connect(store, seat))
        return self._transports[:shares]

    def leave(self) -> None:
        """Gives the transports back, where there are any."""
        transports, self._transports, self._epoch = self._transports, [], 0
        for transport in transports:
            try:
                transport.close()
            except TransportError as error:
                log.warning("%s: %s", self._who, error)
