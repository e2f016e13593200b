"""Histograms of log-ratios and lags: unlike quantiles they add up over micro-batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

RATIO_BINS = 4096
RATIO_LIMIT = 20.0
RATIO_UNIT = 1e-5
"""Bins are equal in asinh(log-ratio / unit): about linear below the unit, logarithmic above it. A quantile of the log-ratio
is right to 0.8 % of itself, or 1e-7 where it is smaller than the unit."""
LAG_BINS = 1024
"""One bin a version of lag; the last one holds all older ones."""

_REACH = math.asinh(RATIO_LIMIT / RATIO_UNIT)


def log_ratio_histogram(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Counts [RATIO_BINS] of the values where `mask` (same shape) is set; beyond +- 20 they fall in the end bins."""
    scaled = torch.asinh(log_ratio.detach()[mask].double() / RATIO_UNIT) / _REACH
    bins = ((scaled + 1) * (RATIO_BINS / 2)).nan_to_num(0.0).long().clamp(0, RATIO_BINS - 1)
    return torch.bincount(bins, minlength=RATIO_BINS)


def ratio_quantile(histogram: np.ndarray, q: float) -> float:
    """The q-quantile of the ratio exp(log-ratio); NaN of an empty histogram."""
    place = _place(histogram, q)
    if place is None:
        return math.nan
    # The middle of the bin; that of the two bins next to zero is zero, where an on-policy step has all its ratios.
    middle = 0.0 if place in (RATIO_BINS // 2 - 1, RATIO_BINS // 2) else (place + 0.5) / (RATIO_BINS / 2) - 1
    return math.exp(RATIO_UNIT * math.sinh(middle * _REACH))


def lag_histogram(lags: np.ndarray) -> np.ndarray:
    """Counts [LAG_BINS] of lags >= 0."""
    return np.bincount(np.minimum(lags, LAG_BINS - 1), minlength=LAG_BINS)


def lag_quantile(histogram: np.ndarray, q: float) -> float:
    """The smallest lag that a share `q` of the tokens does not exceed; 0 of an empty histogram."""
    return float(_place(histogram, q) or 0)


def _place(histogram: np.ndarray, q: float) -> int | None:
    below = np.cumsum(histogram)
    if below[-1] == 0:
        return None
    return int(np.searchsorted(below, max(q * below[-1], 1.0)))
