"""What is said through the store's queues (`engine.weights.control`)."""

from __future__ import annotations

from msgspec import Struct
from msgspec.json import Decoder
from torch import Tensor

from engine.weights.layout import Layout
from engine.weights.patch import PatchLayout


class Join(Struct, frozen=True, tag="join"):
    """I want every update. `version` is the newest that I hold, `card` the GPU that mine lie on (empty: the host's memory)."""

    member: int
    name: str
    card: str = ""
    version: int | None = None


class Beat(Struct, frozen=True, tag="beat"):
    member: int


class Ready(Struct, frozen=True, tag="ready"):
    """The memory for this offer is there: `nbytes` of it."""

    member: int
    offer: int
    nbytes: int


class Done(Struct, frozen=True, tag="done"):
    """All tensors of this offer are verified."""

    member: int
    offer: int


class Refused(Struct, frozen=True, tag="refused"):
    """These tensors of this offer failed their check."""

    member: int
    offer: int
    tensors: list[str]


class Failed(Struct, frozen=True, tag="failed"):
    """This offer could not be received, and why."""

    member: int
    offer: int
    reason: str


class Leave(Struct, frozen=True, tag="leave"):
    member: int


class Offer(Struct, frozen=True, tag="offer"):
    """Version `version` is to be had; make room for it. Its tensors come in shares, one after another in the memory, each
    from another rank of the learner; with `patches` each share as the change of a version that is held."""

    offer: int
    version: int
    bucket_bytes: int
    shares: list[Layout]
    patches: list[PatchLayout] = []

    @property
    def nbytes(self) -> int:
        """Of what is sent."""
        return sum(part.nbytes for part in self.patches or self.shares)

    @property
    def names(self) -> list[str]:
        """Of the tensors, share after share."""
        return [entry.name for share in self.shares for entry in share.entries]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The shares' parts of a buffer that holds all of them: uint8 [sum of the shares' nbytes], not copied."""
        return list(flat.split([share.nbytes for share in self.shares]))


class Take(Struct, frozen=True, tag="take"):
    """Receive this offer now, as `rank` of `size` in the groups of `epoch`, one for each share: of NCCL or of gloo."""

    offer: int
    epoch: int
    rank: int
    size: int
    nccl: bool


class Check(Struct, frozen=True, tag="check"):
    """What the tensors of this offer must hash to, share after share."""

    offer: int
    fingerprints: list[str]


class Dropped(Struct, frozen=True, tag="dropped"):
    """You are no member any more; join again."""


class Stop(Struct, frozen=True, tag="stop"):
    """A subscriber or a keeper to its own thread: end."""


class Renew(Struct, frozen=True, tag="renew"):
    """Nobody receives any more: take your share of this version aside in place of the one before."""

    version: int


class Send(Struct, frozen=True, tag="send"):
    """Send your share of the version that lies aside, in the group of `epoch`, which has `size` ranks; `patched`, what changed.
    Groups of epochs that are not `live` are of no further use."""

    number: int
    epoch: int
    size: int
    nccl: bool
    patched: bool
    live: list[int]


class Kept(Struct, frozen=True, tag="kept"):
    """A keeper's share of this version lies aside. `card` is the GPU that it sends from, empty for a CPU. `changed` of its
    `entries` differ from the version before, where there is a `patch`."""

    share: int
    version: int
    card: str = ""
    patch: PatchLayout | None = None
    changed: int = 0
    entries: int = 0


class Moved(Struct, frozen=True, tag="moved"):
    """A keeper is still sending."""

    share: int


class Sent(Struct, frozen=True, tag="sent"):
    """A keeper is done with a `Send`: what its share hashes to, or why it could not be sent."""

    share: int
    number: int
    fingerprints: list[str] = []
    error: str = ""


ToPublisher = Join | Beat | Ready | Done | Refused | Failed | Leave
ToMember = Offer | Take | Check | Dropped | Stop
FromKeeper = Kept | Moved | Sent
ToKeeper = Renew | Send | Stop

TO_PUBLISHER: Decoder[ToPublisher] = Decoder(ToPublisher)
TO_MEMBER: Decoder[ToMember] = Decoder(ToMember)
FROM_KEEPER: Decoder[FromKeeper] = Decoder(FromKeeper)
TO_KEEPER: Decoder[ToKeeper] = Decoder(ToKeeper)
