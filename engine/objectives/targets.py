"""What an objective is to the learner: columns of targets from a batch, losses from what the models say.

An objective holds settings only. `prepare` sees one rank's share of one update (whole groups); the losses see one
micro-batch of it and divide by counts taken over all of the update, so the sum over micro-batches and ranks does not
depend on how they were cut. What any of them report are sums, which add up in the same way; `metrics` turns them into
figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from engine.packing import Pack
from protocols.messages import Batch

Totals = dict[str, np.ndarray]
"""Sums over a whole step and all ranks, each a vector (of one entry, unless it is a histogram)."""
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Targets:
    """What an objective wants from a batch of N tokens.

    `mask` bool [N]: the tokens that carry loss. `counts` float64 [K]: what this batch adds to the counts of its update, the
    first of them the losses' denominator; where it is 0 over all of an update, nothing is trained. `columns`: the
    objective's own float32 columns [N]. `sums`: its part of the step's totals.
    """

    mask: np.ndarray
    counts: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)


class PolicyLoss(Protocol):
    def __call__(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, counts: np.ndarray
    ) -> tuple[Tensor, Sums]:
        """`logp` [T] of the pack's tokens; `old` [T], or None where the policy still is that of the step's start; `counts`
        [K] of the whole update."""
        ...


class ValueLoss(Protocol):
    def __call__(self, pack: Pack, targets: Targets, values: Tensor, *, counts: np.ndarray) -> tuple[Tensor, Sums]:
        """`values` [T] of the pack's tokens, `counts` [K] of the whole update."""
        ...


class Objective(Protocol):
    """`sums` names all totals that the other methods report, with their lengths. `recompute_old` says whether the policy's
    loss wants the log-probabilities of the policy of the step's start. A model without a loss is not trained."""

    sums: dict[str, int]
    recompute_old: bool

    @property
    def policy_loss(self) -> PolicyLoss | None: ...

    @property
    def value_loss(self) -> ValueLoss | None: ...

    def prepare(self, batch: Batch, step: int, values: np.ndarray | None) -> Targets:
        """`values` float32 [N] are the critic's of the step's start; None without a loss for a critic."""
        ...

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """Figures of a step whose loss tokens were `tokens` in number."""
        ...


def response_shares(mask: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, float]:
    """For a mean over responses of means over their loss tokens: each token's share of its response, float32 [N], and how
    many responses have loss tokens. `mask` [N], `lengths` [B] of the responses."""
    response = np.repeat(np.arange(len(lengths)), lengths)
    valid = np.bincount(response, weights=mask, minlength=len(lengths))
    return np.repeat(1 / np.maximum(valid, 1), lengths).astype(np.float32), float((valid > 0).sum())
