"""The learner's other ranks as its first one sees them: each keeps a share of the weights aside, and sends it when told to."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed import TCPStore

from engine.weights.control import KEEPERS, send, share_queue, waiting
from engine.weights.layout import Layout
from engine.weights.messages import FROM_KEEPER, FromKeeper, Kept, Moved, Renew, Send, Sent
from engine.weights.transport import TransportError

LOOK_S = 0.0003


class Keepers:
    """Of shares 1, 2, ... of each version; share 0 is the first rank's own."""

    def __init__(self, store: TCPStore, *, silence_s: float) -> None:
        """`silence_s`: a rank that is to send, and of which no byte moves for so long, has failed."""
        self._store, self._silence_s = store, silence_s
        self.shares: list[Layout] = []
        self._version = -1
        self._kept: dict[int, Kept] = {}

    @property
    def count(self) -> int:
        return len(self.shares)

    @property
    def kept(self) -> list[Kept]:
        """What the ranks said of the version that they keep, in the order of the shares."""
        return [kept for _, kept in sorted(self._kept.items())]

    def renew(self, version: int, shares: list[Layout]) -> None:
        """Let the ranks take `shares` (from share 1 on) of `version` aside: what they kept before is not to be had any more."""
        self._version, self.shares, self._kept = version, shares, {}
        for share in range(1, self.count + 1):
            send(self._store, share_queue(share), Renew(version))

    def ready(self) -> bool:
        """Whether all shares of the version lie aside; never blocks."""
        if len(self._kept) < self.count:
            for message in self._heard():
                if isinstance(message, Kept) and message.version == self._version:
                    self._kept[message.share] = message
        return len(self._kept) == self.count

    def tell(self, order: Send) -> None:
        for share in range(1, self.count + 1):
            send(self._store, share_queue(share), order)

    def wait(self, order: Send, moved: Callable[[], None]) -> list[str]:
        """Until all ranks are done with `order`: what the tensors of all shares hash to. `moved` is called while bytes move.
        Raises `TransportError`, once none of them is at it any more, if one has failed."""
        done: dict[int, Sent] = {}
        heard = time.monotonic()
        while len(done) < self.count:
            for message in self._heard():
                if isinstance(message, Sent) and message.number == order.number:
                    done[message.share] = message
                elif not isinstance(message, Moved):
                    continue
                heard = time.monotonic()
                moved()
            if time.monotonic() - heard > self._silence_s:
                missing = next(share for share in range(1, self.count + 1) if share not in done)
                raise TransportError(
                    f"learner rank {missing} has moved nothing of its share for {self._silence_s:.0f} s"
                )
            time.sleep(LOOK_S)
        for sent in done.values():
            if sent.error:
                raise TransportError(sent.error)
        return [fingerprint for _, sent in sorted(done.items()) for fingerprint in sent.fingerprints]

    def close(self) -> None:
        """Let go of the store, for good."""
        self._store = None

    def _heard(self) -> list[FromKeeper]:
        return waiting(self._store, KEEPERS, FROM_KEEPER) if self.count else []
