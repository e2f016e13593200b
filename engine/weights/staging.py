"""Where a rank's share of the weights lies aside while it is sent: in one buffer, or in two by turns to see what changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.weights.layout import Layout
from engine.weights.patch import DTYPES, Patch, make_patch


@dataclass
class Staged:
    """The newest weights of a share, aside. `fingerprints` come with them, or from the first broadcast. `before` is the version before
    in its own buffer, until `patch` was made of it."""

    version: int
    layout: Layout
    flat: Tensor
    fingerprints: list[str] | None
    before: tuple[int, Tensor] | None = None
    patch: Patch | None = None

    def payload(self, patched: bool) -> Tensor:
        """What is sent: uint8 [n]."""
        return self.patch.payload if patched and self.patch is not None else self.flat

    def make_patch(self) -> None:
        """Find what changed since `before`; no `patch` comes of it where none is worth its while."""
        if self.before is not None:
            unit = min(entry.torch_dtype.itemsize for entry in self.layout.entries)
            version, old = self.before
            self.patch = make_patch(old, self.flat, base=version, unit=unit if unit in DTYPES else 1)
            self.before = None


class Staging:
    """Buffers on `device`. With `sparse` the version before is kept, and patches are made of it."""

    def __init__(self, device: torch.device, *, sparse: bool) -> None:
        self._device, self._sparse = device, sparse
        self._newest: Staged | None = None
        self._spare: Tensor | None = None

    def plan(self, version: int, layout: Layout, fingerprints: Mapping[str, str] | None) -> Staged:
        """How a share will lie. `fingerprints` are those of its tensors, or of more."""
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)
        known = None if fingerprints is None else [fingerprints[entry.name] for entry in layout.entries]
        return Staged(version, layout, nothing, known)

    def copy(self, staged: Staged, tensors: Iterable[tuple[str, Tensor]]) -> Staged:
        """Copy those of `tensors` that were planned aside, one after another; all of them are gone through, to the end. Nothing
        may be sending what was staged before."""
        newest, size = self._newest, staged.layout.nbytes
        flat = self._spare if self._sparse or newest is None else newest.flat
        if flat is None or flat.numel() != size:
            flat = torch.zeros(size, dtype=torch.uint8, device=self._device)
        with torch.no_grad():
            views = staged.layout.views(flat)
            for name, tensor in tensors:
                if (view := views.pop(name, None)) is not None:
                    view.copy_(tensor)
        if views:
            raise ValueError(f"weights: {len(views)} tensors did not come, the first is {min(views)}; expected all")
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()
        staged.flat = flat
        if self._sparse and newest is not None:
            self._spare = newest.flat
            if newest.layout == staged.layout:
                staged.before = (newest.version, newest.flat)
        self._newest = staged
        return staged
