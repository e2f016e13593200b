"""PPO with a critic against its formulas in plain padded form, and however a batch is cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import (
    GROUPS,
    make_batch,
    make_config,
    near_policy,
    padded_logprobs,
    padded_values,
    same_bits,
    tiny_critic,
    tiny_model,
    weights_of,
)

from engine.learn_torch import NonFiniteError, TorchLearner
from engine.models import named_weights
from protocols.messages import Batch

CASES: dict[str, dict[str, Any]] = {
    "vcppo": {"type": "vcppo"},
    "vapo": {"type": "vapo", "lam_actor": {"alpha": 0.3}},
    "ppo": {"type": "ppo", "correction": {"type": "none"}},
    "whitened": {"type": "vcppo", "whiten": True, "lam_critic": 0.8, "gamma": 0.9},
    "sequence": {"type": "vapo", "loss": "sequence", "correction": {"type": "truncated", "cap": 0.9}},
    "icepop": {"type": "vapo", "correction": {"type": "icepop", "low": 0.7, "high": 1.2}, "overlong_filter": True},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": {"loss": "sequence", "lam_critic": 0.95, "clip_high": 0.2, "positive_nll": 0.0, "lam_actor": 0.95},
    "vcppo": {"loss": "token", "lam_critic": 1.0, "clip_high": 0.2, "positive_nll": 0.0, "lam_actor": 0.95},
    "vapo": {
        "loss": "token",
        "lam_critic": 1.0,
        "clip_high": 0.28,
        "positive_nll": 0.1,
        "lam_actor": {"alpha": 0.05},
    },
}
VALUE_CLIP = 0.1


def stale_batch(seed: int) -> Batch:
    """Of step 4, tokens of versions 0 to 3, shaped rewards, some responses truncated."""
    rng = np.random.default_rng(seed)
    batch = near_policy(make_batch(GROUPS, seed=seed, step=4), seed)
    columns = {name: getattr(batch, name) for name in batch.__struct_fields__}
    columns["versions"] = rng.integers(0, 4, len(batch.tokens)).astype(np.int32)
    columns["truncated"] = np.arange(12) % 4 == 1
    columns["rewards"] = (batch.rewards - rng.random(12) * 0.5).astype(np.float32)
    return Batch(**columns)


def settings_of(objective: dict[str, Any]) -> dict[str, Any]:
    return {
        "gamma": 1.0,
        "whiten": False,
        "overlong_filter": False,
        "correction": {"type": "truncated", "cap": 2.0},
    } | (DEFAULTS[objective["type"]] | objective)


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Token by token from the end."""
    advantages, carried, following = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        carried = reward + gamma * following - value + gamma * lam * carried
        following = value
        advantages.append(carried)
    return advantages[::-1]


def plain_losses(
    model, critic, batch: Batch, objective: dict[str, Any], *, old: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """(policy's loss, critic's loss, figures) of one update: loops over responses, one padded pass of each model."""
    want = settings_of(objective)
    logp, values, behaviour = (
        padded_logprobs(model, batch),
        padded_values(critic, batch),
        torch.from_numpy(batch.logprobs),
    )
    mask = 3 - batch.versions <= 2
    if want["overlong_filter"]:
        mask &= ~np.repeat(batch.truncated, batch.lengths)
    ends = np.cumsum(batch.lengths)
    spans = [np.arange(end - length, end) for end, length in zip(ends, batch.lengths, strict=True)]
    advantages, returns = np.zeros(len(mask)), np.zeros(len(mask))
    for i, at in enumerate(spans):
        rewards = [0.0] * (len(at) - 1) + [float(batch.rewards[i])]
        lam = want["lam_actor"]
        if isinstance(lam, dict):
            lam = min(1.0, max(0.0, 1 - 1 / (lam["alpha"] * len(at))))
        own = start[at].tolist()
        advantages[at] = plain_gae(rewards, own, want["gamma"], lam)
        returns[at] = np.array(own) + plain_gae(rewards, own, want["gamma"], want["lam_critic"])
    figures = {
        "advantage_mean": advantages[mask].mean(),
        "advantage_std": advantages[mask].std(ddof=1),
        "value_mean": start.numpy()[mask].mean(),
        "return_mean": returns[mask].mean(),
        "explained_variance": 1 - (returns - start.numpy())[mask].var() / returns[mask].var(),
    }
    if want["whiten"]:
        advantages = (advantages - advantages[mask].mean()) / math.sqrt(advantages[mask].var(ddof=1) + 1e-8)
    policy, error, right_logp, right, responses = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0, 0
    for i, at in enumerate(spans):
        at = at[mask[at]]
        if not len(at):
            continue
        correction = want["correction"]
        advantage, target = (torch.from_numpy(x[at]).float() for x in (advantages, returns))
        ratio = (logp[at] - (behaviour if correction["type"] == "none" else old)[at]).exp()
        clipped = ratio.clamp(0.8, 1 + want["clip_high"])
        rho = (old[at] - behaviour[at]).exp()
        if correction["type"] == "none":
            rho = torch.ones_like(rho)
        elif correction["type"] == "truncated":
            rho = rho.clamp(max=correction["cap"])
        else:
            rho = torch.where((rho >= correction["low"]) & (rho <= correction["high"]), rho, 0.0)
        share = 1 / len(at) if want["loss"] == "sequence" else 1.0
        policy = policy - share * (rho * torch.minimum(ratio * advantage, clipped * advantage)).sum()
        held = start[at] + (values[at] - start[at]).clamp(-VALUE_CLIP, VALUE_CLIP)
        squared = torch.maximum((values[at] - target).square(), (held - target).square())
        error = error + share * 0.5 * squared.sum()
        if batch.correct[i]:
            right_logp, right = right_logp - logp[at].sum(), right + len(at)
        responses += 1
    denominator = responses if want["loss"] == "sequence" else int(mask.sum())
    figures["nll"] = (right_logp / right).item()
    loss = policy / denominator + want["positive_nll"] * right_logp / right
    return loss, error / denominator, figures


def gradient_of(model, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named_weights(model).values()))])


def make_learner(objective: dict[str, Any], *, critic: dict | None = None, **learner: Any) -> TorchLearner:
    rates = {"grad_clip": 0.0, "value_clip": VALUE_CLIP} | (critic or {})
    config = make_config(
        objective=objective, max_lag=2, critic=rates, **{"token_budget": 30, "grad_clip": 0.0} | learner
    )
    return TorchLearner(config, tiny_model(), critic=tiny_critic())


@pytest.mark.parametrize("case", CASES)
def test_ppo_equals_its_formulas_in_both_updates(case: str) -> None:
    """The second update is off-policy: its `old` and its values must be those of the step's start."""
    objective, batches = CASES[case], [stale_batch(seed) for seed in (1, 2)]
    one = make_learner(objective)
    model, critic = one.model, one.critic.model
    old = [padded_logprobs(model, batch).detach() for batch in batches]
    start = [padded_values(critic, batch).detach() for batch in batches]
    first, first_value, figures = plain_losses(model, critic, batches[0], objective, old=old[0], start=start[0])
    gradients = gradient_of(model, first), gradient_of(critic, first_value)
    metrics = one.step(4, batches[:1])
    torch.testing.assert_close(one.optimizer.gradient, gradients[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.critic.optimizer.gradient, gradients[1], atol=1e-5, rtol=1e-4)
    expected = figures | {
        "loss": first.item(),
        "value_loss": first_value.item(),
        "critic_grad_norm": float(gradients[1].norm()),
        "pretraining": 0.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)

    second, second_value, _ = plain_losses(model, critic, batches[1], objective, old=old[1], start=start[1])
    gradients = gradient_of(model, second), gradient_of(critic, second_value)
    both = make_learner(objective)
    metrics = both.step(4, batches)
    torch.testing.assert_close(both.optimizer.gradient, gradients[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.critic.optimizer.gradient, gradients[1], atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx((first.item() + second.item()) / 2, abs=1e-5)
    assert metrics["value_loss"] == pytest.approx((first_value.item() + second_value.item()) / 2, abs=1e-5)
    assert metrics["value_clipped_fraction"] > 0


@pytest.mark.parametrize("case", CASES)
def test_token_budget_does_not_change_losses_and_gradients(case: str) -> None:
    batch, results = stale_batch(3), []
    for token_budget in (8, 40, 10_000):
        learner = make_learner(CASES[case], token_budget=token_budget)
        metrics = learner.step(4, [batch])
        metrics.pop("prompt_tokens_saved")
        results.append((metrics, learner.optimizer.gradient, learner.critic.optimizer.gradient))
    for metrics, *gradients in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-5)
        for gradient, expected in zip(gradients, results[0][1:], strict=True):
            torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4)


def test_two_norms_and_two_rates() -> None:
    learner = make_learner({"type": "vcppo"}, lr=0.4, warmup_steps=8, critic={"lr": 0.1, "warmup_steps": 0})
    metrics = learner.step(4, [stale_batch(1)])
    assert (metrics["lr"], metrics["critic_lr"]) == pytest.approx((0.2, 0.1))
    assert metrics["grad_norm"] == pytest.approx(learner.optimizer.gradient.norm().item())
    assert metrics["critic_grad_norm"] == pytest.approx(learner.critic.optimizer.gradient.norm().item())
    clipped = make_learner({"type": "vcppo"}, critic={"grad_clip": 1e-3})
    clipped.step(4, [stale_batch(1)])
    assert clipped.critic.optimizer.gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert clipped.optimizer.gradient.norm().item() > 1e-2


def test_a_critic_that_is_not_finite_stops_both_before_a_weight_changes() -> None:
    learner = make_learner({"type": "vcppo"})
    before = weights_of(learner.model)
    with torch.no_grad():
        learner.critic.model.score.weight.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="step 4, update 1 of 1: "):
        learner.step(4, [stale_batch(1)])
    assert same_bits(weights_of(learner.model), before)


def test_a_step_without_right_answers_has_no_likelihood_term() -> None:
    batch = stale_batch(1)
    columns = {name: getattr(batch, name) for name in batch.__struct_fields__}
    wrong = Batch(**columns | {"correct": np.zeros(12, bool), "rewards": np.full(12, -1, np.float32)})
    metrics = make_learner({"type": "vapo"}).step(4, [wrong])
    assert metrics["nll"] == 0
    assert math.isfinite(metrics["loss"])


def test_returns_that_do_not_vary_have_no_explained_variance() -> None:
    batch = stale_batch(1)
    columns = {name: getattr(batch, name) for name in batch.__struct_fields__}
    equal = Batch(**columns | {"rewards": np.full(12, -0.7, np.float32)})
    assert math.isnan(make_learner({"type": "vcppo"}).step(4, [equal])["explained_variance"])


def test_collecting_changes_nothing_and_reports_the_data() -> None:
    batch, model = stale_batch(1), tiny_model()
    before = weights_of(model)
    learner = TorchLearner(make_config(objective={"type": "collect"}, max_lag=2), model)
    metrics = learner.step(4, [batch])
    assert same_bits(weights_of(model), before)
    assert list(learner.optimizer_state().items()) == []
    assert (metrics["accuracy"], metrics["updates"]) == (batch.correct.mean(), 0)
    assert metrics["length_mean"] == pytest.approx(55 / 12)
    assert metrics["reward_mean"] == pytest.approx(float(batch.rewards.mean()))
    assert "loss" not in metrics


def test_ppo_without_a_critic_is_refused() -> None:
    with pytest.raises(ValueError, match="objective vcppo: got no critic"):
        TorchLearner(make_config(objective={"type": "vcppo"}, critic={}), tiny_model())
