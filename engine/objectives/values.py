"""The critic's part of an objective: its squared error, and how good it was at the step's start."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from engine.losses import value_loss
from engine.objectives.targets import Sums, Targets, Totals
from engine.packing import Pack

VALUE_SUMS = ("value", "return", "return_squared", "error", "error_squared")


def value_sums(values: np.ndarray, returns: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over tokens, in fp64, that `value_figures` is made from. They add up over batches and ranks."""
    value, target = values.astype(np.float64), returns.astype(np.float64)
    error = target - value
    columns = (value, target, target * target, error, error * error)
    return {name: np.array([column.sum()]) for name, column in zip(VALUE_SUMS, columns, strict=True)}


def value_figures(totals: Totals, tokens: float) -> dict[str, float]:
    """`value_error` (0.5 (V - R)^2), `explained_variance` (1 - Var(R - V) / Var(R), NaN where R does not vary), and the means
    of V and R, over `tokens` tokens."""
    value, target, squared, error, error_squared = (float(totals[name][0]) / max(tokens, 1.0) for name in VALUE_SUMS)
    spread, unexplained = squared - target * target, error_squared - error * error
    varies = spread > 1e-12 * squared  # what is left of equal numbers is rounding
    return {
        "value_error": 0.5 * error_squared,
        "explained_variance": 1 - unexplained / spread if varies else math.nan,
        "value_mean": value,
        "return_mean": target,
    }


def squared_error(
    pack: Pack, targets: Targets, values: Tensor, *, clip: float | None, counts: np.ndarray
) -> tuple[Tensor, Sums]:
    """`value_loss` of the pack's `values` [T] against the columns `returns` and `values`, by `share` where there is one."""
    share = targets.columns.get("share")
    loss, sums = value_loss(
        pack.rows(values),
        pack.column(targets.columns["values"]),
        pack.column(targets.columns["returns"]),
        pack.column(targets.mask),
        clip=clip,
        denominator=float(counts[0]),
        weights=None if share is None else pack.column(share),
    )
    return loss, {"value_clipped": sums["clipped"]}
