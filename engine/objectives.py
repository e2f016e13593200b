"""What is minimised: `prepare` turns a batch into per-token columns, `loss` turns log-probabilities into a number.

An objective holds settings only. `prepare` sees one rank's share of one update (whole groups); `loss` sees one micro-batch
of it and divides by a denominator counted over all of the update, so the sum over micro-batches and ranks does not depend
on how they were cut. What either reports are sums, which add up in the same way; `metrics` turns them into figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.advantages import group_advantages
from engine.config import (
    Config,
    DapoObjective,
    DecoupledCorrection,
    IcepopCorrection,
    NoCorrection,
    SftObjective,
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
from engine.losses import LOG_RATIO_LIMIT, clipped_surrogate, icepop_weights, positive_nll, truncated_weights
from engine.packing import Pack
from protocols.messages import Batch

Totals = dict[str, np.ndarray]
"""Sums over a whole step and all ranks, each a vector (of one entry, unless it is a histogram)."""


@dataclass(frozen=True)
class Targets:
    """What an objective wants from a batch of N tokens.

    `mask` bool [N]: the tokens that carry loss. `count`: what this batch adds to its update's denominator. `columns`: the
    objective's own float32 columns [N]. `sums`: its part of the step's totals.
    """

    mask: np.ndarray
    count: float
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)


class Objective(Protocol):
    """`sums` names all totals that `prepare` and `loss` report, with their lengths. `recompute_old` says whether `loss` wants
    the log-probabilities of the policy of the step's start."""

    sums: dict[str, int]
    recompute_old: bool

    def prepare(self, batch: Batch, step: int) -> Targets: ...

    def loss(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`logp` [T] of the pack's tokens; `old` [T], or None where the policy still is that of the step's start."""
        ...

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """Figures of a step whose loss tokens were `tokens` in number."""
        ...


def make_objective(config: Config) -> Objective:
    """The objective that the config names."""
    match config.objective:
        case DapoObjective() as dapo:
            return Dapo(dapo, max_lag=config.buffer.max_lag)
        case SftObjective():
            return Sft()
        case other:
            raise ValueError(f"objective {other.__struct_config__.tag}: not trained by this learner")


class Dapo:
    """DAPO (arXiv 2503.14476) and, by its settings, GRPO: group-normalised advantages on the shaped reward, the clipped
    surrogate with separate bounds, and one denominator for the whole update.

    The denominator counts loss tokens; with `loss = "sequence"` it counts responses that have some, and each of them
    weighs the same. A token older than `max_lag` versions carries no loss; with `overlong_filter` neither does a
    truncated response, though its reward still is part of its group's mean.

    The ratio is taken against the behaviour's log-probabilities without a correction; with one it is taken against the
    policy of the step's start, and the correction weighs each token by that policy over the behaviour. Weighting does
    not change the denominator.
    """

    def __init__(self, config: DapoObjective, *, max_lag: int) -> None:
        self.config, self.max_lag = config, max_lag
        self.recompute_old = not isinstance(config.correction, NoCorrection)
        scalars = ("stale", "kl", "weight", "capped", "clipped_high", "clipped_low", "clipped_dual")
        self.sums = dict.fromkeys(scalars, 1) | {"lag": LAG_BINS, "ratio": RATIO_BINS}

    def prepare(self, batch: Batch, step: int) -> Targets:
        """Raises ValueError for a token sampled by weights that step `step` cannot have seen."""
        lags = step - 1 - batch.versions
        if lags.size and lags.min() < 0:
            raise ValueError(f"step {step}: a token of version {batch.versions.max()}, expected at most {step - 1}")
        mask = lags <= self.max_lag
        sums = {"stale": np.array([(~mask).sum()]), "lag": lag_histogram(lags)}
        if self.config.overlong_filter:
            mask &= ~np.repeat(batch.truncated, batch.lengths)
        groups = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
        advantages = group_advantages(
            torch.tensor(batch.rewards), torch.from_numpy(groups), normalize_std=self.config.normalize_std
        ).numpy()
        columns = {"advantages": np.repeat(advantages, batch.lengths), "behaviour": batch.logprobs}
        if self.config.loss == "token":
            return Targets(mask, float(mask.sum()), columns, sums)
        response = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
        valid = np.bincount(response, weights=mask, minlength=len(batch.lengths))
        columns["share"] = np.repeat(1 / np.maximum(valid, 1), batch.lengths).astype(np.float32)
        return Targets(mask, float((valid > 0).sum()), columns, sums)

    def loss(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, mask = self.config, pack.column(targets.mask)
        behaviour, current = pack.column(targets.columns["behaviour"]), pack.rows(logp)
        start = current.detach() if old is None else pack.rows(old)
        correction = self._correction(start, behaviour, mask)
        weights = correction
        if "share" in targets.columns:
            weights = weights * pack.column(targets.columns["share"])
        loss, sums = clipped_surrogate(
            current,
            start if self.recompute_old else behaviour,
            pack.column(targets.columns["advantages"]),
            mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            denominator=denominator,
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
        match self.config.correction:
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
        match self.config.correction:
            case TruncatedCorrection(cap):
                return mask & (correction >= cap)
            case IcepopCorrection():
                return mask & (correction == 0)
            case _:
                return torch.zeros_like(mask)


class Sft:
    """Maximum likelihood: the mean over all response tokens of -log p. A "group" is a prompt with its solution(s)."""

    def __init__(self) -> None:
        self.sums: dict[str, int] = {}
        self.recompute_old = False

    def prepare(self, batch: Batch, step: int) -> Targets:
        return Targets(np.ones(len(batch.tokens), dtype=bool), float(len(batch.tokens)))

    def loss(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, denominator: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        positive = torch.ones(len(pack.responses), dtype=torch.bool, device=logp.device)
        return positive_nll(pack.rows(logp), pack.column(targets.mask), positive, denominator=denominator), {}

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        return {}
