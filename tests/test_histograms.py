"""Quantiles from histograms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.histograms import RATIO_BINS, lag_histogram, lag_quantile, log_ratio_histogram, ratio_quantile


def test_log_ratio_quantiles_of_a_histogram() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 0.1, 5.0):
        values = scale * torch.randn(4001, generator=generator)
        histogram = log_ratio_histogram(values, torch.ones(4001, dtype=torch.bool)).numpy()
        for q in (0.01, 0.5, 0.99):
            exact = float(np.quantile(values.double().numpy(), q, method="inverted_cdf"))
            assert math.log(ratio_quantile(histogram, q)) == pytest.approx(exact, rel=0.01, abs=1e-7)
    assert ratio_quantile(log_ratio_histogram(torch.zeros(3), torch.ones(3, dtype=torch.bool)).numpy(), 0.5) == 1.0
    assert math.isnan(ratio_quantile(np.zeros(RATIO_BINS), 0.5))


def test_lag_quantiles_of_a_histogram() -> None:
    lags = np.array([0] * 98 + [1, 5])
    histogram = lag_histogram(lags)
    assert [lag_quantile(histogram, q) for q in (0.5, 0.99, 1.0)] == [0, 1, 5]
    assert lag_quantile(lag_histogram(np.zeros(0, np.int32)), 0.5) == 0
