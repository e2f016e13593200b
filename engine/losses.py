"""Losses: pure functions of tensors.

Every loss is a sum over tokens divided by a `denominator` that the caller counted over the whole update (all micro-batches
of all ranks), so that the losses of any split of a batch add up to the same number. The denominator is 0 only when
nothing counts anywhere; the loss is then 0. Metrics are sums over the given tokens and add up in the same way.

Masked positions may hold anything, NaN included: they reach neither the loss nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to +- this before `exp`."""
TIE = 1e-6
"""A ratio that equals a clip bound up to rounding counts as clipped: it has no gradient."""

Metrics = dict[str, Tensor]


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    denominator: float | Tensor,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate with DAPO's separate bounds (eq. 8), to be minimised:

        -sum(w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)) / denominator,   r = exp(logp - old_logp)

    `logp`, `old_logp`, `advantages`, `mask` and `weights` (detached; default 1) are [B, T]. `dual_clip` c > 1 bounds the
    loss of a token with A < 0 by -c A (verl). A token at or beyond the bound that clips it has no gradient.

    Returns (loss, metrics); the metrics count tokens, as float scalars: `tokens` (valid ones), `clipped_high` (A > 0,
    r >= 1 + clip_high), `clipped_low` (A < 0, r <= 1 - clip_low), `clipped_dual` (A < 0, r >= dual_clip).
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"clipped_surrogate: dual_clip: got {dual_clip}, expected None or more than 1")
    mask = mask.bool()
    advantages = torch.where(mask, advantages, 0.0)
    ratio = _log_ratio(logp, old_logp, mask).exp()
    up, down = advantages > 0, advantages < 0
    bounds = [
        ("clipped_high", up, 1 + clip_high),
        ("clipped_low", down, 1 - clip_low),
        ("clipped_dual", down, dual_clip),
    ]
    metrics = {"tokens": mask.sum().float()}
    for name, sign, bound in bounds:
        if bound is None:
            metrics[name] = torch.zeros_like(metrics["tokens"])
            continue
        below = name == "clipped_low"
        clipped = sign & ((ratio <= bound * (1 + TIE)) if below else (ratio >= bound * (1 - TIE)))
        metrics[name] = clipped.sum().float()
        ratio = torch.where(clipped, bound, ratio)
    loss = -ratio * advantages
    if weights is not None:
        loss = loss * torch.where(mask, weights.detach(), 0.0)
    return _divide(loss.sum(), denominator), metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    denominator: float | Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The critic's squared error, 0.5 sum(w (V - R)^2) / denominator (VC-PPO, Algorithm 1), all [B, T].

    With `clip` c a token's error is the larger one of V and of V held within `old_values` +- c (PPO2's value clipping).
    `weights` (detached) are 1 by default.
    Returns (loss, metrics): `tokens`, and `clipped`, how many tokens the held value decided.
    """
    mask = mask.bool()
    returns = torch.where(mask, returns, 0.0)
    values = torch.where(mask, values, 0.0)
    error = (values - returns).square()
    clipped = torch.zeros_like(mask)
    if clip is not None:
        old = torch.where(mask, old_values, 0.0).detach()
        held = (torch.clamp(values, old - clip, old + clip) - returns).square()
        clipped = held > error
        error = torch.where(clipped, held, error)
    if weights is not None:
        error = error * torch.where(mask, weights.detach(), 0.0)
    loss = _divide(0.5 * error.sum(), denominator)
    return loss, {"tokens": mask.sum().float(), "clipped": clipped.sum().float()}


def positive_nll(logp: Tensor, mask: Tensor, positive: Tensor, *, denominator: float | Tensor) -> Tensor:
    """VAPO's language-model loss on right answers (eq. 9): -sum(logp) over the valid tokens of positive responses.

    `logp`, `mask` [B, T], `positive` [B] bool; `denominator` counts the positive responses' valid tokens, over all
    ranks. Without any, the loss is 0. With every response positive it is the supervised loss.
    """
    chosen = mask.bool() & positive.bool()[:, None]
    return _divide(-torch.where(chosen, logp, 0.0).sum(), denominator)


def truncated_weights(
    old_logp: Tensor, behaviour_logp: Tensor, mask: Tensor, *, cap: float = 2.0, level: str = "token"
) -> Tensor:
    """Truncated importance weights min(rho, cap), rho = exp(old_logp - behaviour_logp): [B, T] -> [B, T], detached.

    `level` "sequence" takes the product of rho over a response's valid tokens, the same weight for each of them. Masked
    positions get 0. `cap` may be infinite.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"truncated_weights: level: got {level!r}, expected 'token' or 'sequence'")
    mask = mask.bool()
    log_ratio = _log_ratio(old_logp.detach(), behaviour_logp.detach(), mask, limit=level == "token")
    if level == "sequence":
        product = log_ratio.sum(dim=-1, keepdim=True).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        log_ratio = product.expand_as(log_ratio)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)


def icepop_weights(old_logp: Tensor, behaviour_logp: Tensor, mask: Tensor, *, low: float, high: float) -> Tensor:
    """IcePop: rho = exp(old_logp - behaviour_logp) where low <= rho <= high, else 0: [B, T] -> [B, T], detached."""
    mask = mask.bool()
    ratio = _log_ratio(old_logp.detach(), behaviour_logp.detach(), mask).exp()
    return torch.where(mask & (ratio >= low) & (ratio <= high), ratio, 0.0)


def _log_ratio(logp: Tensor, other: Tensor, mask: Tensor, *, limit: bool = True) -> Tensor:
    difference = torch.where(mask, logp - other, 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) if limit else difference


def _divide(total: Tensor, denominator: float | Tensor) -> Tensor:
    return total / denominator if denominator else total
