"""Advantages against published numbers and against the plain sums that define them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.advantages import (
    CHUNK,
    decoupled_gae,
    explained_variance,
    gae,
    group_advantages,
    length_adaptive_lambda,
)

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))
EXACT = torch.float64


def close(got: torch.Tensor, expected: object, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(expected, dtype=EXACT), atol=atol, rtol=0)


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def plain_gae(rewards, values, mask, gamma: float, lam: list[float]) -> torch.Tensor:
    """O(T^2): each advantage as the sum of its discounted temporal differences, over the sequence without masked tokens."""
    result = torch.zeros(values.shape, dtype=EXACT)
    for b in range(values.shape[0]):
        at = [t for t in range(values.shape[1]) if mask[b, t]]
        v = [float(values[b, t]) for t in at] + [0.0]
        delta = [float(rewards[b, t]) + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            result[b, t] = sum((gamma * lam[b]) ** (j - i) * delta[j] for j in range(i, len(at)))
    return result


# --- groups --------------------------------------------------------------------------------------------------------


def test_group_advantages_of_published_groups() -> None:
    vector = VECTORS["C1"]
    rewards = torch.tensor([float(r) for group in vector["inputs"]["groups"] for r in group])
    groups = torch.tensor([i for i, group in enumerate(vector["inputs"]["groups"]) for _ in group])
    firsts = [0, 4, 8]
    lasts = [3, 7, 23]
    normed = group_advantages(rewards, groups)
    close(normed[firsts], vector["expected"]["A_verl_first"])
    close(normed[lasts], vector["expected"]["A_verl_last"])
    centred = group_advantages(rewards, groups, normalize_std=False)
    close(centred[firsts], vector["expected"]["A_mean_only_first"])
    close(centred[lasts], vector["expected"]["A_mean_only_last"])


def test_group_advantages_of_shaped_rewards() -> None:
    expected = VECTORS["C2"]["expected"]
    close(group_advantages(torch.tensor(expected["R"]), torch.zeros(4, dtype=torch.int64)), expected["A_verl"])


@given(st.permutations(range(9)))
def test_group_advantages_do_not_depend_on_order_or_ids(order: list[int]) -> None:
    rewards, groups = torch.tensor([1.0, -1, 1, 0.5, -1, 2, 3, 1, 7]), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    expected = group_advantages(rewards, groups)
    close(group_advantages(rewards[order], 1000 - 7 * groups[order]), expected[order], atol=1e-6)


def test_group_of_one_keeps_its_reward_and_equal_rewards_give_nothing() -> None:
    rewards = torch.tensor([0.7, 0.1, 0.1, 0.1, 1.3, 1.3])
    advantages = group_advantages(rewards, torch.tensor([9, 4, 4, 4, 2, 2]))
    close(advantages[0], 0.7, atol=1e-6)
    close(advantages[1:], torch.zeros(5), atol=1e-6)


# --- GAE -----------------------------------------------------------------------------------------------------------


def test_decoupled_gae_of_a_terminal_reward() -> None:
    inputs, expected = VECTORS["E1"]["inputs"], VECTORS["E1"]["expected"]
    values, mask = row(inputs["V"]), torch.ones(1, 5, dtype=torch.bool)
    for sign in ("plus", "minus"):
        rewards = row(inputs[f"r_{sign}"])
        advantages, targets = decoupled_gae(rewards, values, mask, gamma=1.0, lam_actor=0.95, lam_critic=1.0)
        close(advantages[0], expected[f"A_actor_{sign}"])
        close(targets[0], expected[f"target_critic_{sign}"])
        _, coupled = decoupled_gae(rewards, values, mask, gamma=1.0, lam_actor=0.95, lam_critic=0.95)
        close(coupled[0], expected[f"coupled_target_lam095_{sign}"])
    close(gae(row(inputs["r_plus"]), values, mask, gamma=1.0, lam=1.0)[0], expected["A_lam1_plus"])
    close(gae(row(inputs["r_plus"]), values, mask, gamma=1.0, lam=0.0)[0], expected["A_lam0_plus"])


def test_gae_is_the_mixture_of_n_step_returns() -> None:
    inputs, expected = VECTORS["E2"]["inputs"], VECTORS["E2"]["expected"]
    advantages = gae(row(inputs["r"]), row(inputs["V"]), torch.ones(1, 5), gamma=1.0, lam=inputs["lam"])
    close(advantages[0, 0], expected["mixture_minus_V"])


@pytest.mark.parametrize("name", ["E3", "E4"])
@pytest.mark.parametrize("garbage", [None, math.nan, math.inf, 1e30])
def test_gae_passes_through_masked_tokens(name: str, garbage: float | None) -> None:
    inputs, expected = VECTORS[name]["inputs"], VECTORS[name]["expected"]
    mask = torch.tensor([inputs["mask"]], dtype=torch.bool)
    values, rewards = row(inputs["V"]), row(inputs["r"])
    if garbage is not None:
        values[~mask], rewards[~mask] = garbage, garbage
    advantages, targets = decoupled_gae(rewards, values, mask, gamma=1.0, lam_actor=inputs["lam"], lam_critic=1.0)
    close(advantages[mask], expected["A_at_mask1"])
    close(targets[mask], torch.ones(int(mask.sum())))
    assert not advantages[~mask].any()
    assert not targets[~mask].any()


def test_weight_of_a_terminal_reward_decays_with_the_distance() -> None:
    inputs, expected = VECTORS["E7"]["inputs"], VECTORS["E7"]["expected"]
    rewards = torch.zeros(1, 200, dtype=EXACT)
    rewards[0, -1] = 1
    for lam, weights in zip(inputs["lam"], expected["weights"], strict=True):
        advantages = gae(rewards, torch.zeros_like(rewards), torch.ones(1, 200), gamma=1.0, lam=lam)
        picked = advantages[0, [199 - distance for distance in inputs["distance"]]]
        torch.testing.assert_close(picked, torch.tensor(weights, dtype=EXACT), rtol=1e-6, atol=0)


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3 * CHUNK + 2)),
    gamma=st.sampled_from([1.0, 0.99, 0.5]),
    lams=st.lists(st.sampled_from([0.0, 0.3, 0.95, 1.0]), min_size=4, max_size=4),
    density=st.sampled_from([0.0, 0.2, 0.9, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_gae_equals_the_plain_sums(seed: int, shape, gamma: float, lams: list[float], density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(shape, generator=generator, dtype=EXACT) for _ in range(2))
    mask = torch.rand(shape, generator=generator) < density
    lam = torch.tensor(lams[: shape[0]], dtype=EXACT)
    expected = plain_gae(rewards, values, mask, gamma, lam.tolist())
    close(gae(rewards, values, mask, gamma=gamma, lam=lam), expected, atol=1e-9)
    close(gae(rewards, values, mask, gamma=gamma, lam=lams[0])[:1], expected[:1], atol=1e-9)
    close(gae(rewards.float(), values.float(), mask, gamma=gamma, lam=lam), expected, atol=1e-3)


def test_critic_targets_with_lambda_one_are_the_rewards_to_go() -> None:
    inputs, expected = VECTORS["G1"]["inputs"], VECTORS["G1"]["expected"]
    rewards = row(inputs["with_step_rewards_example"])
    values = torch.randn(1, 3)
    _, targets = decoupled_gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam_actor=0.9, lam_critic=1.0)
    close(targets[0], expected["reward_to_go_example"])


def test_gae_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"rewards \[1, 3\], values \[1, 4\]"):
        gae(torch.zeros(1, 3), torch.zeros(1, 4), torch.ones(1, 3), gamma=1.0, lam=1.0)


def test_gae_of_nothing() -> None:
    for shape in ((0, 4), (2, 0)):
        assert gae(*(torch.zeros(shape) for _ in range(3)), gamma=1.0, lam=0.9).shape == shape


# --- the rest ------------------------------------------------------------------------------------------------------


def test_length_adaptive_lambda() -> None:
    inputs, expected = VECTORS["F1"]["inputs"], VECTORS["F1"]["expected"]
    close(length_adaptive_lambda(torch.tensor(inputs["l"]), alpha=inputs["alpha"]), expected["lam_clamped"], atol=1e-6)
    assert length_adaptive_lambda(torch.tensor([0]), alpha=0.05).item() == 0


def test_explained_variance() -> None:
    inputs, expected = VECTORS["G3"]["inputs"], VECTORS["G3"]["expected"]
    values, returns = row([*inputs["V"], math.nan]), row([*inputs["R"], 50.0])
    mask = torch.tensor([[True] * 5 + [False]])
    close(explained_variance(values, returns, mask), expected["EV"])
    assert explained_variance(returns, returns, mask).item() == 1
    assert math.isnan(explained_variance(values, torch.ones_like(returns), mask).item())
