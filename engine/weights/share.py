"""A learner rank's share of the weights: it lies aside here, and goes from here to those who receive the version."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from engine.devices import card_of, exact_device
from engine.weights.layout import Digests
from engine.weights.messages import Send
from engine.weights.staging import Staged, Staging
from engine.weights.terms import Terms
from engine.weights.transport import Connect, Seat, Transport, TransportError, transfer

log = logging.getLogger(__name__)


class Share:
    """What lies aside (`staged`), and this rank's seat, rank 0, in the groups that it is sent in."""

    def __init__(self, number: int, store: TCPStore, connect: Connect, *, address: str, terms: Terms) -> None:
        """`address` is this machine's, as members reach it."""
        self.staging = Staging(terms.kept_on, sparse=terms.sparse)
        self.staged: Staged | None = None
        self._number, self._store, self._connect = number, store, connect
        self._address, self._terms = address, terms
        self._device = exact_device(terms.device)
        self.card = card_of(self._device)
        """The GPU that NCCL sends from; empty where it cannot."""
        self._transports: dict[int, Transport] = {}

    @property
    def nbytes(self) -> int:
        """What lies aside, in bytes."""
        return 0 if self.staged is None else self.staged.flat.numel()

    def send(self, order: Send, moved: Callable[[], None]) -> list[str]:
        """Send what lies aside; what its tensors hash to, in the layout's order. `moved` is called after each bucket. Raises
        `TransportError`; the group is closed then."""
        staged = self.staged
        if staged is None:
            raise TransportError(f"share {self._number}: asked for, but nothing lies aside")
        self._close_but(order.live)
        digests = Digests(staged.layout) if staged.fingerprints is None else None
        try:
            for bucket in transfer(self._seated(order), staged.payload(order.patched), self._terms.bucket_bytes):
                moved()
                if digests is not None and not order.patched:
                    digests.feed(bucket)
        except TransportError:
            self._close_but(set(order.live) - {order.epoch})
            raise
        if digests is not None:
            if order.patched:
                digests.feed(staged.flat)
            staged.fingerprints = digests.result()
        return staged.fingerprints or []

    def close(self) -> None:
        """Close all groups, for good."""
        self._close_but([])
        self.staged = self._store = None

    def _seated(self, order: Send) -> Transport:
        if order.epoch not in self._transports:
            device = self._device if order.nccl else torch.device("cpu")
            timeout_s = self._terms.peer_timeout_s
            seat = Seat(order.epoch, self._number, 0, order.size, self._address, device, timeout_s)
            store = self._store.clone()
            store.set_timeout(timedelta(seconds=timeout_s))
            self._transports[order.epoch] = self._connect(store, seat)
        return self._transports[order.epoch]

    def _close_but(self, live: Iterable[int]) -> None:
        for epoch in set(self._transports) - set(live):
            try:
                self._transports.pop(epoch).close()
            except TransportError as error:
                log.warning("weights: %s", error)
