"""Sums of a step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Totals:
    """Vectors that add up over micro-batches, updates and ranks, in fp64 on the device (no waiting for it while training)."""

    def __init__(self, lengths: dict[str, int], device: torch.device) -> None:
        self.vectors = {name: torch.zeros(n, dtype=torch.float64, device=device) for name, n in lengths.items()}

    def add(self, sums: Mapping[str, Tensor] | Mapping[str, np.ndarray]) -> None:
        for name, values in sums.items():
            self.vectors[name] += torch.as_tensor(values, device=self.vectors[name].device)

    def flat(self) -> np.ndarray:
        return torch.cat(list(self.vectors.values())).cpu().numpy()

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([len(vector) for vector in self.vectors.values()])
        return dict(zip(self.vectors, np.split(flat, ends[:-1]), strict=True))
