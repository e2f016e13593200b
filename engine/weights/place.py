"""A subscriber's place in the publisher's process groups (`engine.weights.groups`)."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from engine.weights.control import Take
from engine.weights.transport import Connect, Seat, Transport, TransportError

log = logging.getLogger(__name__)


class Place:
    """Holds the transport of the group that it was last told to take; `who` it is for, in the log. `address` is this machine's,
    as the other ranks reach it."""

    def __init__(self, who: str, connect: Connect, *, address: str, device: torch.device, timeout_s: float) -> None:
        self._who, self._connect = who, connect
        self._address, self._device, self._timeout_s = address, device, timeout_s
        self._transport: Transport | None = None
        self._epoch = 0

    def take(self, store: TCPStore, take: Take) -> Transport:
        """The transport of `take`'s group: the one that is there, or a new one in place of it. Raises `TransportError`."""
        if self._transport is None or self._epoch != take.epoch:
            self.leave()
            seat = Seat(take.epoch, take.rank, take.size, self._address, self._device, self._timeout_s)
            store = store.clone()
            store.set_timeout(timedelta(seconds=self._timeout_s))
            self._transport, self._epoch = self._connect(store, seat), take.epoch
        return self._transport

    def leave(self) -> None:
        """Gives the transport back, where there is one."""
        transport, self._transport, self._epoch = self._transport, None, 0
        if transport is not None:
            try:
                transport.close()
            except TransportError as error:
                log.warning("%s: %s", self._who, error)
