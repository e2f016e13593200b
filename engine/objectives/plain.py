"""Objectives without advantages: the likelihood of solutions, and none at all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.losses import positive_nll
from engine.objectives.targets import Sums, Targets, Totals
from engine.packing import Pack
from protocols.messages import Batch


class Sft:
    """Maximum likelihood: the mean over all response tokens of -log p. A "group" is a prompt with its solution(s)."""

    recompute_old, value_loss = False, None

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    def prepare(self, batch: Batch, step: int, values: np.ndarray | None) -> Targets:
        """Every token carries loss."""
        return Targets(np.ones(len(batch.tokens), dtype=bool), np.array([float(len(batch.tokens))]))

    def policy_loss(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, counts: np.ndarray
    ) -> tuple[Tensor, Sums]:
        """See `PolicyLoss`."""
        positive = torch.ones(len(pack.responses), dtype=torch.bool, device=logp.device)
        mask = pack.column(targets.mask)
        return positive_nll(pack.rows(logp), mask, positive, denominator=float(counts[0])), {}

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """None but those of every step."""
        return {}


class Collect:
    """Nothing is trained: no token carries loss."""

    recompute_old, policy_loss, value_loss = False, None, None

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}

    def prepare(self, batch: Batch, step: int, values: np.ndarray | None) -> Targets:
        """No token carries loss."""
        return Targets(np.zeros(len(batch.tokens), dtype=bool), np.zeros(1))

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """None but those of every step."""
        return {}
