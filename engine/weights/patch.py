"""What changed between two versions of a flat buffer: exact to the bit, and small where few entries changed.

In bfloat16 at the learning rates of RL most weights round to the value they had, so an update is mostly a repetition. A
patch holds, block by block, the entries that differ: their values and the gaps between their places, in one or two bytes
each, whichever is smaller; a block of which too much changed comes as it is. A gap that is too wide for its bytes is bridged
by entries that did not change. (Entries are compared as bits: NaNs and signed zeros are values like any other.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from msgspec import Struct
from torch import Tensor

BLOCK_BYTES = 4 << 20
"""Small enough that rarely used rows of an embedding cost nothing, and large enough that their headers do not count."""
WORTH_IT = 0.9
"""A patch of more than this share of all bytes is not worth its making."""
ALIGNMENT = 8
DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
GAPS = {1: torch.uint8, 2: torch.uint16}


class Piece(Struct, frozen=True, array_like=True):
    """A block's part of a patch: `count` entries, each with a gap of `gap` bytes; `gap` 0: all entries of the block."""

    gap: int
    count: int


class PatchLayout(Struct, frozen=True):
    """How a patch lies in its payload. `base` is the version that it changes, `unit` the bytes of an entry, `block` the
    entries of a block. Raises `ValueError` for numbers that no patch has."""

    base: int
    unit: int
    block: int
    pieces: list[Piece]

    def __post_init__(self) -> None:
        if self.unit not in DTYPES or self.block < 1:
            raise ValueError(f"weights: patch: got entries of {self.unit} bytes in blocks of {self.block}")
        for piece in self.pieces:
            if piece.gap not in (0, *GAPS) or not 0 <= piece.count <= self.block:
                raise ValueError(f"weights: patch: got {piece}, expected a gap of 0, 1 or 2 and at most {self.block}")

    @property
    def nbytes(self) -> int:
        """Size of the payload; never 0."""
        return max(ALIGNMENT, sum(_aligned(p.count * self.unit) + _aligned(p.count * p.gap) for p in self.pieces))

    def apply(self, payload: Tensor, flat: Tensor) -> None:
        """Turn `flat` (uint8 [n]) from version `base` into the patch's; `payload` is uint8 [nbytes].

        Raises `ValueError` for a payload that does not fit; `flat` may have been changed in part by then.
        """
        blocks = flat.view(DTYPES[self.unit]).split(self.block)
        if len(blocks) != len(self.pieces):
            raise ValueError(f"weights: patch: got {len(self.pieces)} blocks, expected {len(blocks)}")
        at = 0
        for number, (piece, block) in enumerate(zip(self.pieces, blocks, strict=True)):
            values = payload[at : at + piece.count * self.unit].view(DTYPES[self.unit])
            at += _aligned(piece.count * self.unit)
            gaps = payload[at : at + piece.count * piece.gap]
            at += _aligned(piece.count * piece.gap)
            if piece.gap:
                _put(block, values, gaps.view(GAPS[piece.gap]), f"block {number}")
            elif piece.count == block.numel():
                block.copy_(values)
            else:
                raise ValueError(f"weights: patch: block {number}: got {piece.count} entries, expected {block.numel()}")


@dataclass(frozen=True)
class Patch:
    """The change of a flat buffer. `changed` of its `entries` differ."""

    layout: PatchLayout
    payload: Tensor
    changed: int
    entries: int


def make_patch(old: Tensor, new: Tensor, *, base: int, unit: int) -> Patch | None:
    """What turns `old`, of version `base`, into `new` (both uint8 [n], n a multiple of 8), in entries of `unit` bytes; None
    where it would save next to nothing."""
    block = BLOCK_BYTES // unit
    pieces: list[Piece] = []
    parts: list[Tensor] = []
    changed = size = 0
    for before, after in zip(old.view(DTYPES[unit]).split(block), new.view(DTYPES[unit]).split(block), strict=True):
        places = (before != after).nonzero().view(-1)
        piece, values, gaps = _encode(places, after, unit)
        pieces.append(piece)
        parts += [_padded(values), _padded(gaps)]
        changed += places.numel()
        size += parts[-1].numel() + parts[-2].numel()
        if size > WORTH_IT * new.numel():
            return None
    payload = torch.cat(parts) if size else torch.zeros(ALIGNMENT, dtype=torch.uint8, device=new.device)
    return Patch(PatchLayout(base, unit, block, pieces), payload, changed, new.numel() // unit)


def _encode(places: Tensor, block: Tensor, unit: int) -> tuple[Piece, Tensor, Tensor]:
    """A block's piece, and the bytes of its values and of its gaps."""
    whole = block.numel() * unit
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    sizes = {0: whole}
    if places.numel() * (unit + 1) < whole:
        for gap in GAPS:
            bridges = int(torch.div(gaps, 256**gap, rounding_mode="floor").sum())
            sizes[gap] = (places.numel() + bridges) * (unit + gap)
    gap = min(sizes, key=lambda gap: sizes[gap])
    if not gap:
        return Piece(0, block.numel()), _bytes(block), _bytes(block[:0])
    places = _bridged(places, gaps, 256**gap)
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    return Piece(gap, places.numel()), _bytes(block[places]), _bytes(gaps.to(GAPS[gap]))


def _bridged(places: Tensor, gaps: Tensor, reach: int) -> Tensor:
    """`places` (rising) and those between them that leave no gap of `reach` or more."""
    bridges = torch.div(gaps, reach, rounding_mode="floor")
    if not bridges.any():
        return places
    first = (bridges.cumsum(0) - bridges).repeat_interleave(bridges)
    number = torch.arange(first.numel(), device=places.device) - first + 1
    between = (places - gaps - 1).repeat_interleave(bridges) + number * reach
    return torch.cat([places, between]).sort().values


def _put(block: Tensor, values: Tensor, gaps: Tensor, where: str) -> None:
    places = (gaps.to(torch.int64) + 1).cumsum(0) - 1
    if places.numel():
        if (last := int(places[-1])) >= block.numel():
            raise ValueError(f"weights: patch: {where}: got an entry at {last}, expected fewer than {block.numel()}")
        block[places] = values


def _bytes(entries: Tensor) -> Tensor:
    return entries.contiguous().view(torch.uint8)


def _padded(part: Tensor) -> Tensor:
    return torch.nn.functional.pad(part, (0, _aligned(part.numel()) - part.numel()))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
