"""An update on its way in: as whole tensors, or as the change of a version that is held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.weights.control import Offer
from engine.weights.layout import Digests
from engine.weights.patch import PatchLayout
from engine.weights.transport import Transport, transfer
from engine.weights.update import Shelf


class NotHeld(ValueError):
    """A patch is for a version whose bytes are not there (any more)."""


@dataclass
class Incoming:
    """What was offered, and the buffer that its payload comes into; then, once all is in, the buffer with the tensors and
    what they hash to, in the layout's order."""

    offer: Offer
    payload: Tensor
    flat: Tensor | None = None
    fingerprints: list[str] | None = None

    def receive(self, transport: Transport, shelf: Shelf) -> None:
        """Takes all of it from `transport`. Raises `TransportError`, and `ValueError` for a patch that does not fit."""
        digests = Digests(self.offer.layout)
        for bucket in transfer(transport, self.payload, self.offer.bucket_bytes):
            if self.offer.patch is None:
                digests.feed(bucket)
        if self.offer.patch is None:
            self.flat = self.payload
        else:
            self.flat = _patched(self.offer.patch, self.payload, shelf)
            digests.feed(self.flat)
        self.fingerprints = digests.result()


def make_room(offer: Offer, shelf: Shelf, device: torch.device) -> Incoming:
    """The place for what is offered. Raises `NotHeld`."""
    if offer.patch is None:
        return Incoming(offer, shelf.claim(offer.layout.nbytes))
    if not shelf.holds(offer.patch.base):  # it was overwritten by an update that did not arrive
        raise NotHeld(f"version {offer.patch.base}, which a patch was offered for, is not held")
    return Incoming(offer, torch.empty(offer.patch.nbytes, dtype=torch.uint8, device=device))


def _patched(patch: PatchLayout, payload: Tensor, shelf: Shelf) -> Tensor:
    flat = shelf.claim_filled(patch.base)
    if flat is None:
        raise NotHeld(f"version {patch.base} is not held any more")
    patch.apply(payload, flat)
    return flat
