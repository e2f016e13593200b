"""How named tensors lie in one flat buffer of bytes, and the fingerprints that prove they arrived.

A fingerprint is the xxh3_128 hash, in hex, of a tensor's dtype, its shape and its raw bytes, so that neither swapped
nor reinterpreted tensors pass for one another.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from msgspec import Struct
from torch import Tensor

ALIGNMENT = 64
"""Every tensor starts at a multiple of this many bytes, so that any dtype may be viewed in place."""


class Entry(Struct, frozen=True):
    """One tensor: `dtype` as in `torch.<dtype>`, `offset` into the flat buffer in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def __post_init__(self) -> None:
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"weights: {self.name}: got dtype {self.dtype!r}, expected one of torch")
        if any(size < 0 for size in self.shape) or self.offset < 0 or self.offset % ALIGNMENT:
            raise ValueError(
                f"weights: {self.name}: got shape {list(self.shape)} at byte {self.offset}, "
                f"expected sizes >= 0 at a multiple of {ALIGNMENT}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.offset + math.prod(self.shape) * self.torch_dtype.itemsize


class Layout(Struct, frozen=True):
    """The tensors of one update in the order of their bytes. Raises `ValueError` where two of them overlap."""

    entries: list[Entry]

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError("weights: got no tensor, expected at least one")
        end = 0
        for entry in self.entries:
            if entry.offset < end:
                raise ValueError(f"weights: {entry.name}: starts at byte {entry.offset}, expected {end} or later")
            end = entry.end

    @property
    def nbytes(self) -> int:
        """Size of the flat buffer, padding included; never 0."""
        return max(ALIGNMENT, _aligned(self.entries[-1].end))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors in `flat` (uint8 [nbytes]) by name, without a copy."""
        return {
            entry.name: flat[entry.offset : entry.end].view(entry.torch_dtype).view(entry.shape)
            for entry in self.entries
        }


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of `tensors`, sorted by name. Raises `ValueError` when there is none."""
    return share_out(tensors, 1)[0]


def share_out(tensors: Mapping[str, Tensor], count: int) -> list[Layout]:
    """The layouts of at most `count` shares of `tensors`, none of them empty: each tensor, from the largest to the smallest, goes
    to the share that has the fewest bytes. Raises `ValueError` when there is no tensor."""
    shares: list[list[str]] = [[] for _ in range(max(1, min(count, len(tensors))))]
    held = [(0, number) for number in range(len(shares))]
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        nbytes, number = heapq.heappop(held)
        shares[number].append(name)
        heapq.heappush(held, (nbytes + max(1, tensors[name].nbytes), number))
    return [_laid_out({name: tensors[name] for name in sorted(names)}) for names in shares]


def _laid_out(tensors: Mapping[str, Tensor]) -> Layout:
    entries, offset = [], 0
    for name, tensor in tensors.items():
        entries.append(Entry(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        offset = _aligned(entries[-1].end)
    return Layout(entries)


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The fingerprint of each tensor, by name. A tensor off the CPU is copied to it, one at a time."""
    return {name: fingerprint(tensor) for name, tensor in sorted(tensors.items())}


def fingerprint(tensor: Tensor) -> str:
    """The fingerprint of one tensor."""
    hasher = _hasher(str(tensor.dtype).removeprefix("torch."), tensor.shape)
    hasher.update(host_bytes(tensor.detach().contiguous().view(-1).view(torch.uint8)))
    return str(hasher.hexdigest())


def weights_hash(fingerprints: Mapping[str, str]) -> str:
    """One hash, in hex, over the names and fingerprints of all tensors, whatever their order in the mapping."""
    text = "".join(f"{name}\0{value}\n" for name, value in sorted(fingerprints.items()))
    return xxhash.xxh3_128_hexdigest(text.encode())


class Digests:
    """The fingerprints of the tensors of a flat buffer, computed while its bytes come in, in order."""

    def __init__(self, layout: Layout) -> None:
        self._rest = iter(layout.entries)
        self._entry = next(self._rest, None)
        self._hash = self._start()
        self._fed = 0
        self._done: list[str] = []

    def feed(self, piece: Tensor) -> None:
        """`piece` (uint8) follows what was fed before."""
        data, start = host_bytes(piece), self._fed
        self._fed += piece.numel()
        while self._entry is not None and self._hash is not None and self._entry.offset < self._fed:
            first, last = max(self._entry.offset, start), min(self._entry.end, self._fed)
            self._hash.update(data[first - start : max(first, last) - start])
            if self._entry.end > self._fed:
                return
            self._finish()

    def result(self) -> list[str]:
        """The fingerprints in the layout's order, once all bytes are in."""
        while self._entry is not None and self._entry.offset == self._entry.end:
            self._finish()
        if self._entry is not None:
            raise ValueError(f"weights: {self._fed} bytes fed, expected at least {self._entry.end}")
        return list(self._done)

    def _finish(self) -> None:
        if self._hash is not None:
            self._done.append(self._hash.hexdigest())
        self._entry = next(self._rest, None)
        self._hash = self._start()

    def _start(self) -> Any:
        return None if self._entry is None else _hasher(self._entry.dtype, self._entry.shape)


def host_bytes(piece: Tensor) -> np.ndarray:
    """The bytes of a uint8 tensor on the CPU: a view where it is there already."""
    array: np.ndarray = piece.cpu().numpy()
    return array


def _hasher(dtype: str, shape: Iterable[int]) -> Any:
    return xxhash.xxh3_128(f"{dtype}{list(shape)}\0".encode())


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
