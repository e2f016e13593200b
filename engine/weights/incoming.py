"""An update on its way in: as whole tensors, or as the change of a version that is held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.weights.layout import Digests
from engine.weights.messages import Offer
from engine.weights.transport import Transport, side_by_side, transfer
from engine.weights.update import Shelf


class NotHeld(ValueError):
    """A patch is for a version whose bytes are not there (any more)."""


@dataclass
class Incoming:
    """What was offered, and the buffers that the shares' payloads come into; then, once all is in, the buffer with the tensors
    and what they hash to, share after share."""

    offer: Offer
    payloads: list[Tensor]
    flat: Tensor | None = None
    fingerprints: list[str] | None = None

    def receive(self, transports: list[Transport], shelf: Shelf) -> None:
        """Takes each share from its transport. Raises `TransportError`, and `ValueError` for a patch that does not fit."""
        digests = [Digests(share) for share in self.offer.shares]
        ways = zip(transports, self.payloads, strict=True)
        transfers = [transfer(transport, payload, self.offer.bucket_bytes) for transport, payload in ways]
        for share, bucket in side_by_side(transfers):
            if not self.offer.patches:
                digests[share].feed(bucket)
        if self.offer.patches:
            self.flat = self._patched(shelf)
            for digest, part in zip(digests, self.offer.parts(self.flat), strict=True):
                digest.feed(part)
        self.fingerprints = [fingerprint for digest in digests for fingerprint in digest.result()]

    def tensors(self) -> dict[str, Tensor]:
        """All shares' tensors by name, views of `flat`."""
        if self.flat is None:
            return {}
        shares = zip(self.offer.shares, self.offer.parts(self.flat), strict=True)
        return {name: tensor for share, part in shares for name, tensor in share.views(part).items()}

    def _patched(self, shelf: Shelf) -> Tensor:
        base = self.offer.patches[0].base
        flat = shelf.claim_filled(base)
        if flat is None:
            raise NotHeld(f"version {base} is not held any more")
        for patch, payload, part in zip(self.offer.patches, self.payloads, self.offer.parts(flat), strict=True):
            patch.apply(payload, part)
        return flat


def make_room(offer: Offer, shelf: Shelf, device: torch.device) -> Incoming:
    """The place for what is offered. Raises `NotHeld`."""
    if not offer.patches:
        flat = shelf.claim(offer.nbytes)
        return Incoming(offer, offer.parts(flat), flat)
    if not shelf.holds(base := offer.patches[0].base):  # it was overwritten by an update that did not arrive
        raise NotHeld(f"version {base}, which a patch was offered for, is not held")
    return Incoming(offer, [torch.empty(patch.nbytes, dtype=torch.uint8, device=device) for patch in offer.patches])
