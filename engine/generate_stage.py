"""Weights on their way into vLLM's workers: memory that this process fills and the workers map.

The memory has no name in any file system (memfd), so nothing is left behind however the processes end, and the size of
/dev/shm does not limit it. A whole update lies there before any of it is applied, so a learner that dies in the middle of
one leaves the weights in use as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from engine.weights.layout import Layout, layout_of


class Stage:
    """Named tensors in one shared buffer, on the CPU."""

    def __init__(self, layout: Layout, path: str) -> None:
        """Maps what lies at `path`; `create` makes it."""
        self.layout, self.path = layout, path
        self.flat = torch.from_file(path, shared=True, size=layout.nbytes, dtype=torch.uint8)
        self.tensors: dict[str, Tensor] = layout.views(self.flat)

    @classmethod
    def create(cls, like: Mapping[str, Tensor]) -> Stage:
        """Room for tensors of these names, shapes and types; it holds zeros."""
        layout = layout_of(like)
        descriptor = os.memfd_create("headrace-weights")
        os.ftruncate(descriptor, layout.nbytes)
        stage = cls(layout, f"/proc/{os.getpid()}/fd/{descriptor}")
        stage._descriptor = descriptor
        return stage

    @classmethod
    def attach(cls, described: tuple[str, str]) -> Stage:
        """The same memory in another process of the same user; `described` is the maker's `description`."""
        path, layout = described
        return cls(msgspec.json.decode(layout, type=Layout), path)

    @property
    def description(self) -> tuple[str, str]:
        return self.path, msgspec.json.encode(self.layout).decode()

    def fill(self, weights: Mapping[str, Tensor]) -> None:
        """Copy in `weights`, which have exactly the names and shapes; types are converted."""
        for name, tensor in self.tensors.items():
            tensor.copy_(weights[name])

    def seal(self) -> None:
        """Everybody who needs the memory has mapped it: it stays until they unmap it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    _descriptor: int | None = None
