"""Advantages and value targets: pure functions of tensors.

`mask` is True where the policy chose the token. A masked position (prompt, tool output, padding) contributes nothing and
breaks no recursion: what is carried passes through it, so every result equals that of the sequence with the masked
positions cut out. Their inputs may hold anything, NaN included; their outputs are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32
"""Tokens that `gae` scans at once: one small matrix product in place of that many steps of a loop."""


def group_advantages(rewards: Tensor, groups: Tensor, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """GRPO's and DAPO's advantage of each response: A_i = (R_i - mean(R)) / (std(R) + eps) over its group (DAPO eq. 9).

    `rewards` [B], shaped; `groups` [B] integer ids in any order -> [B]. std is the sample's (ddof 1); without
    `normalize_std` only the mean is taken off. A group of one has nothing to compare with: its advantage is its reward.
    """
    exact = rewards.double()  # in float32 the mean of equal rewards leaves a residue that the small std then blows up
    _, member = torch.unique(groups, return_inverse=True)
    size = torch.bincount(member)
    total = torch.zeros(size.shape, dtype=exact.dtype, device=exact.device).index_add_(0, member, exact)
    single = size == 1
    centred = exact - torch.where(single, 0.0, total / size)[member]
    if normalize_std:
        squares = torch.zeros_like(total).index_add_(0, member, centred * centred)
        std = (squares / (size - 1).clamp(min=1)).sqrt()
        centred = centred / torch.where(single, 1.0, std + eps)[member]
    return centred.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016): A_t = delta_t + gamma lam A_{t+1}, where
    delta_t = r_t + gamma V_{t+1} - V_t, over the valid positions only.

    `rewards`, `values`, `mask` [B, T] -> advantages [B, T], 0 where masked. `lam` is a float or [B] (VAPO's
    length-adaptive one). The value after the last valid token is 0, so a truncated response counts as ended. A reward
    on a masked position does not count: put a terminal reward on the last valid token.
    """
    if rewards.shape != values.shape or rewards.shape != mask.shape or rewards.dim() != 2:
        raise ValueError(
            f"gae: rewards {list(rewards.shape)}, values {list(values.shape)}, mask {list(mask.shape)}: expected one [B, T]"
        )
    mask = mask.bool()
    order = mask.logical_not().byte().argsort(dim=1, stable=True)  # valid positions first, in their order
    precise = torch.promote_types(values.dtype, torch.float32)
    value = torch.where(mask, values, 0.0).to(precise).gather(1, order)
    reward = torch.where(mask, rewards, 0.0).to(precise).gather(1, order)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], dim=1)
    delta = reward + gamma * following - value
    decay = gamma * torch.as_tensor(lam, dtype=delta.dtype, device=delta.device).expand(delta.shape[0])
    advantages = torch.zeros_like(delta).scatter(1, order, _discounted_sums(delta, decay))
    return torch.where(mask, advantages, 0.0)


def decoupled_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam_actor: float | Tensor, lam_critic: float
) -> tuple[Tensor, Tensor]:
    """VC-PPO's decoupled GAE: advantages with `lam_actor`, the critic's targets V_t + A_t with `lam_critic`.

    All [B, T]; `lam_actor` a float or [B]. With gamma = 1 and `lam_critic` = 1 a target is the sum of the rewards from its
    token on, whatever the critic says. Masked positions of both results are 0.
    """
    advantages = gae(rewards, values, mask, gamma=gamma, lam=lam_actor)
    errors = gae(rewards, values, mask, gamma=gamma, lam=lam_critic)
    return advantages, torch.where(mask.bool(), values + errors, 0.0)


def length_adaptive_lambda(lengths: Tensor, *, alpha: float) -> Tensor:
    """VAPO's lambda of each response, 1 - 1 / (alpha l) (eq. 5): `lengths` [B] -> [B], clamped to [0, 1]."""
    if alpha <= 0:
        raise ValueError(f"length_adaptive_lambda: alpha: got {alpha}, expected a positive number")
    lengths = lengths if lengths.is_floating_point() else lengths.float()
    return (1 - 1 / (alpha * lengths)).clamp(0, 1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the valid tokens of [B, T]: 1 is a perfect critic, 0 one no better than
    the mean. A scalar; NaN where the returns do not vary."""
    mask = mask.bool()
    target, error = returns[mask].double(), (returns - values)[mask].double()
    spread = (target - target.mean()).square().mean()
    unexplained = (error - error.mean()).square().mean()
    ratio = 1 - unexplained / spread
    return torch.where(spread > 0, ratio, torch.nan).to(values.dtype)


def _discounted_sums(delta: Tensor, decay: Tensor) -> Tensor:
    """sum_{s >= t} decay^(s - t) delta_s: `delta` [B, T], `decay` [B] -> [B, T], scanned from the end in chunks."""
    step = torch.arange(min(CHUNK, delta.shape[1]), device=delta.device)
    distance = step[:, None] - step[None, :]  # [s, t]
    powers = torch.where(distance >= 0, decay[:, None, None] ** distance.clamp(min=0), 0.0)
    carried = torch.zeros_like(delta[:, :1])
    chunks: list[Tensor] = []
    for chunk in reversed(delta.split(CHUNK, dim=1)):
        size = chunk.shape[1]
        inside = torch.bmm(chunk[:, None], powers[:, :size, :size])[:, 0]
        chunks.append(inside + carried * decay[:, None] ** (size - step[:size]))
        carried = chunks[-1][:, :1]
    return torch.cat(chunks[::-1], dim=1)
