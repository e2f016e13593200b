"""PPO with a critic (VC-PPO, VAPO), and the critic's pretraining before it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.advantages import decoupled_gae, length_adaptive_lambda
from engine.config import LengthAdaptive, PpoObjective
from engine.losses import positive_nll
from engine.objectives.surrogate import Surrogate
from engine.objectives.targets import Sums, Targets, Totals, response_shares
from engine.objectives.values import VALUE_SUMS, squared_error, value_figures, value_sums
from engine.packing import Pack
from protocols.messages import Batch

WHITENING_EPS = 1e-8
DENOMINATOR, TOKENS, RIGHT_TOKENS, ADVANTAGE, ADVANTAGE_SQUARED = range(5)
"""Counts of an update: the losses' denominator; loss tokens, and those of right answers; sums over the loss tokens."""


class Ppo(Surrogate):
    """PPO with decoupled GAE (VC-PPO, arXiv 2503.01491) and VAPO's additions (arXiv 2504.05118).

    Advantages and the critic's targets come from the values of the step's start, for all updates. They run over every token
    of a response, whichever of them carry loss: a token that is masked out was still sampled, and the tokens before it led
    to it. With `whiten` an update's advantages get mean 0 and deviation 1 over its loss tokens on all ranks.
    """

    def __init__(self, config: PpoObjective, *, max_lag: int, value_clip: float | None) -> None:
        super().__init__(config, max_lag=max_lag)
        self.config, self.value_clip = config, value_clip
        scalars = (*VALUE_SUMS, "value_clipped", "advantage", "advantage_squared", "nll", "right_tokens")
        self.sums |= dict.fromkeys(scalars, 1)

    def prepare(self, batch: Batch, step: int, values: np.ndarray | None) -> Targets:
        """See `Surrogate.targets`. Raises ValueError without the values of a critic."""
        if values is None:
            raise ValueError("ppo: got no values, expected those of a critic")
        common = self.targets(batch, step)
        mask = common.mask
        advantages, returns = gae_columns(batch, values, self.config)
        of_loss = advantages[mask].astype(np.float64)
        right = np.repeat(batch.correct, batch.lengths) & mask
        moments = {
            "advantage": of_loss.sum(),
            "advantage_squared": (of_loss * of_loss).sum(),
            "right_tokens": right.sum(),
        }
        sums = {name: np.array([value], dtype=np.float64) for name, value in moments.items()}
        counts = [common.counts[0], mask.sum(), right.sum(), of_loss.sum(), (of_loss * of_loss).sum()]
        return Targets(
            mask,
            np.array(counts, dtype=np.float64),
            common.columns
            | {"advantages": advantages, "returns": returns, "values": values}
            | {"right": np.repeat(batch.correct, batch.lengths)},
            common.sums | sums | value_sums(values[mask], returns[mask]),
        )

    def advantages(self, pack: Pack, targets: Targets, counts: np.ndarray) -> Tensor:
        """See `Surrogate.advantages`; whitened by the update's moments (ddof 1)."""
        found = super().advantages(pack, targets, counts)
        if not self.config.whiten:
            return found
        mean, variance = moments_of(counts[TOKENS], counts[ADVANTAGE], counts[ADVANTAGE_SQUARED])
        return (found - mean) / (variance + WHITENING_EPS) ** 0.5

    def policy_loss(
        self, pack: Pack, targets: Targets, logp: Tensor, old: Tensor | None, *, counts: np.ndarray
    ) -> tuple[Tensor, Sums]:
        """The surrogate plus `positive_nll` (VAPO's mu) times the likelihood loss of right answers."""
        loss, sums = super().policy_loss(pack, targets, logp, old, counts=counts)
        right = pack.column(targets.columns["right"])[:, 0]
        nll = positive_nll(pack.rows(logp), pack.column(targets.mask), right, denominator=1.0)
        sums["nll"] = nll.detach()
        if self.config.positive_nll and counts[RIGHT_TOKENS]:
            loss = loss + self.config.positive_nll * nll / float(counts[RIGHT_TOKENS])
        return loss, sums

    def value_loss(self, pack: Pack, targets: Targets, values: Tensor, *, counts: np.ndarray) -> tuple[Tensor, Sums]:
        """See `ValueLoss`: over the same tokens, and with the same weights, as the policy's loss."""
        return squared_error(pack, targets, values, clip=self.value_clip, counts=counts)

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """See `Objective`. Advantages are those before whitening."""
        one = {name: float(values[0]) for name, values in totals.items()}
        mean, variance = moments_of(tokens, one["advantage"], one["advantage_squared"])
        return {
            **super().metrics(totals, tokens),
            **critic_metrics(totals, tokens),
            "advantage_mean": mean,
            "advantage_std": variance**0.5,
            "nll": one["nll"] / max(one["right_tokens"], 1.0),
            "pretraining": 0.0,
        }


class ValuePretraining:
    """Only the critic is trained, on whole returns: with lambda 1, gamma 1 and a reward at the end every token's target is
    its response's reward. There is no clip, and no token is too old: the policy that sampled it is the one there is."""

    recompute_old, policy_loss = False, None

    def __init__(self, *, loss: str, overlong_filter: bool) -> None:
        self.loss, self.overlong_filter = loss, overlong_filter
        self.sums = dict.fromkeys((*VALUE_SUMS, "value_clipped"), 1)

    def prepare(self, batch: Batch, step: int, values: np.ndarray | None) -> Targets:
        """Raises ValueError without the values of a critic."""
        if values is None:
            raise ValueError("value pretraining: got no values, expected those of a critic")
        mask = np.ones(len(batch.tokens), dtype=bool)
        if self.overlong_filter:
            mask &= ~np.repeat(batch.truncated, batch.lengths)
        columns, count = {"returns": np.repeat(batch.rewards, batch.lengths), "values": values}, float(mask.sum())
        if self.loss == "sequence":
            columns["share"], count = response_shares(mask, batch.lengths)
        return Targets(mask, np.array([count]), columns, value_sums(values[mask], columns["returns"][mask]))

    def value_loss(self, pack: Pack, targets: Targets, values: Tensor, *, counts: np.ndarray) -> tuple[Tensor, Sums]:
        """See `ValueLoss`."""
        return squared_error(pack, targets, values, clip=None, counts=counts)

    def metrics(self, totals: Totals, tokens: float) -> dict[str, float]:
        """See `Objective`."""
        return {**critic_metrics(totals, tokens), "pretraining": 1.0}


def gae_columns(batch: Batch, values: np.ndarray, config: PpoObjective) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and the critic's targets, float32 [N], of every token: the shaped reward is on a response's last one."""
    lengths = batch.lengths.astype(np.int64)
    if not len(lengths):
        return np.zeros(0, np.float32), np.zeros(0, np.float32)
    shape = (len(lengths), int(lengths.max()))
    place = np.arange(shape[1])[None] < lengths[:, None]
    laid_out, rewards = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    laid_out[place] = values
    rewards[np.arange(shape[0]), lengths - 1] = batch.rewards
    lam = config.lam_actor
    advantages, returns = decoupled_gae(
        torch.from_numpy(rewards),
        torch.from_numpy(laid_out),
        torch.from_numpy(place),
        gamma=config.gamma,
        lam_actor=length_adaptive_lambda(torch.from_numpy(lengths), alpha=lam.alpha)
        if isinstance(lam, LengthAdaptive)
        else lam,
        lam_critic=config.lam_critic,
    )
    return advantages.numpy()[place], returns.numpy()[place]


def moments_of(count: float, total: float, squares: float) -> tuple[float, float]:
    """(mean, variance with ddof 1) of `count` numbers from their sum and the sum of their squares."""
    mean = total / max(count, 1.0)
    return mean, max(0.0, squares - count * mean * mean) / max(count - 1.0, 1.0)


def critic_metrics(totals: Totals, tokens: float) -> dict[str, float]:
    """Figures of the critic; what it is trained on is in `value_loss`, which the learner adds."""
    figures = value_figures(totals, tokens)
    del figures["value_error"]
    return figures | {"value_clipped_fraction": float(totals["value_clipped"][0]) / tokens}
