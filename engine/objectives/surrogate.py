"""The clipped surrogate with everything around it that does not depend on where the advantages come from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.config import (
    DapoObjective,
    DecoupledCorrection,
    IcepopCorrection,
    NoCorrection,
    PpoObjective,
    TruncatedCorrection,
)
from engine.histograms import (
    LAG_BINS,
    RATIO_BINS,
    lag_histogram,
    lag_quantile,
    log_ratio_histogram,
    ratio_quantile,
)
from engine.losses import LOG_RATIO_LIMIT, clipped_surrogate, icepop_weights, truncated_weights
from engine.objectives.targets import Sums, Targets, Totals, response_shares
from engine.packing import Pack
from protocols.messages import Batch


class Surrogate:
    """The clipped surrogate with separate bounds, and one denominator for the whole update.

    The denominator counts loss tokens; with `loss = "sequence"` it counts responses that have some, and each of them
    weighs the same. A token older than `max_lag` versions carries no loss; with `overlong_filter` neither does a
    truncated response, though its reward still counts where advantages are made.

    The ratio is taken against the behaviour's log-probabilities without a correction; with one it is taken against the
    policy of the step's start, and the correction weighs each token by that policy over the behaviour. Weighting does
    not change the denominator.
    """

    def __init__(self, config: DapoObjective | PpoObjective, *, max_lag: int) -> None:
        self.bounds, self.max_lag = config, max_lag
        self.recompute_old = not isinstance(config.correction, NoCorrection)
        scalars = ("stale", "kl", "weight", "capped", "clipped_high", "clipped_low", "clipped_dual")
        self.sums = dict.fromkeys(scalars, 1) | {"lag": LAG_BINS, "ratio": RATIO_BINS}

    def targets(self, batch: Batch, step: int) -> Targets:
        """The loss tokens, their denominator and the columns of all but the advantages. Raises ValueError for a token
        sampled by weights that step `step` cannot have seen."""
        lags = step - 1 - batch.versions
        if lags.size and lags.min() < 0:
            raise ValueError(f"step {step}: a token of version {batch.versions.max()}, expected at most {step - 1}")
        mask = lags <= self.max_lag
        sums = {"stale": np.array([(~mask).sum()]), "lag": lag_histogram(lags)}
        if self.bounds.overlong_filter:
            mask &= ~np.repeat(batch.truncated, batch.lengths)
        columns, count = {"behaviour": batch.logprobs}, float(mask.sum())
        if self.bounds.loss == "sequence":
            columns["share"], count = response_shares(mask, batch.lengths)
        return Targets(mask, np.array([count]), columns, sums)

    def advantages(self, pack: Pack, targets: Targets, counts: np.ndarray) -> Tensor:
        """The advantages [S, L] that the surrogate weighs."""
        return pack.column(targets.columns["advantages"])

    def policy_loss(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, counts: np.ndarray
    ) -> tuple[Tensor, Sums]:
        """See `PolicyLoss`."""
        bounds, mask = self.bounds, pack.column(targets.mask)
        behaviour, current = pack.column(targets.columns["behaviour"]), pack.rows(logp)
        start = current.detach() if old is None else pack.rows(old)
        correction = self._correction(start, behaviour, mask)
        weights = correction
        if "share" in targets.columns:
            weights = weights * pack.column(targets.columns["share"])
        loss, sums = clipped_surrogate(
            current,
            start if self.recompute_old else behaviour,
            self.advantages(pack, targets, counts),
            mask,
            clip_low=bounds.clip_low,
            clip_high=bounds.clip_high,
            dual_clip=bounds.dual_clip,
            denominator=float(counts[0]),
            weights=weights,
        )
        log_ratio = (current.detach() - behaviour).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        kl = log_ratio.exp() - 1 - log_ratio  # k3, of the behaviour from the policy (Schulman 2020)
        sums |= {
            "kl": torch.where(mask, kl, 0.0).sum(),
            "ratio": log_ratio_histogram(log_ratio, mask),
            "weight": correction.sum(),
            "capped": self._capped(correction, mask).sum(),
        }
        del sums["tokens"]
        return loss, sums

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """See `Objective`."""
        lag = totals["lag"]
        return {
            **{
                f"clip_fraction_{side}": float(totals[f"clipped_{side}"][0]) / tokens
                for side in ("high", "low", "dual")
            },
            **{f"ratio_p{p:02}": ratio_quantile(totals["ratio"], p / 100) for p in (1, 50, 99)},
            "kl_behaviour": float(totals["kl"][0]) / tokens,
            "weight_mean": float(totals["weight"][0]) / tokens,
            "weight_capped_fraction": float(totals["capped"][0]) / tokens,
            "stale_fraction": float(totals["stale"][0] / max(lag.sum(), 1)),
            "lag_mean": float((lag * np.arange(LAG_BINS)).sum() / max(lag.sum(), 1)),
            "lag_p99": lag_quantile(lag, 0.99),
            "lag_max": lag_quantile(lag, 1.0),
        }

    def _correction(self, start: Tensor, behaviour: Tensor, mask: Tensor) -> Tensor:
        match self.bounds.correction:
            case NoCorrection():
                return mask.to(start.dtype)
            case DecoupledCorrection():
                return truncated_weights(start, behaviour, mask, cap=float("inf"))
            case TruncatedCorrection(cap, level):
                return truncated_weights(start, behaviour, mask, cap=cap, level=level)
            case IcepopCorrection(low, high):
                return icepop_weights(start, behaviour, mask, low=low, high=high)

    def _capped(self, correction: Tensor, mask: Tensor) -> Tensor:
        """Tokens whose weight was cut: truncated to the cap, or set to 0 by IcePop."""
        match self.bounds.correction:
            case TruncatedCorrection(cap):
                return mask & (correction >= cap)
            case IcepopCorrection():
                return mask & (correction == 0)
            case _:
                return torch.zeros_like(mask)
