"""The learner against the plain formulas, on one and on two ranks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import learner_rank
import numpy as np
import pytest
import torch
from learner_cases import (
    GROUPS,
    make_batch,
    make_config,
    near_policy,
    padded_logprobs,
    same_bits,
    tiny_model,
    weights_of,
)
from safetensors.torch import load_file

from engine.learn_torch import NonFiniteError, TorchLearner
from engine.models import named_weights
from protocols.messages import Batch

CORRECTIONS = {
    "none": {"type": "none"},
    "decoupled": {"type": "decoupled"},
    "token": {"type": "truncated", "cap": 0.9},
    "sequence": {"type": "truncated", "cap": 0.9, "level": "sequence"},
    "icepop": {"type": "icepop", "low": 0.7, "high": 1.2},
}
PROMISED = {
    "loss", "grad_norm", "lr", "entropy", "clip_fraction_high", "clip_fraction_low", "ratio_p01", "ratio_p50", "ratio_p99",
    "kl_behaviour", "weight_mean", "weight_capped_fraction", "lag_mean", "lag_p99", "lag_max", "masked_fraction",
    "length_mean", "reward_mean", "accuracy", "trained_tokens", "prompt_tokens_saved", "updates",
}  # fmt: skip


def plain_loss(
    model, batch: Batch, objective: dict, *, old: torch.Tensor, mask: np.ndarray, temperature: float
) -> torch.Tensor:
    """DAPO from its formulas: loops over responses, one padded forward pass, no micro-batches."""
    logp = padded_logprobs(model, batch, temperature)
    behaviour = torch.from_numpy(batch.logprobs)
    ends = np.cumsum(batch.lengths)
    group_of = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
    correction = objective.get("correction", CORRECTIONS["none"])
    total, responses = torch.zeros(()), 0
    for i, end in enumerate(ends):
        at = np.arange(end - batch.lengths[i], end)
        at = at[mask[at]]
        if not len(at):
            continue
        rewards = batch.rewards[group_of == group_of[i]]
        advantage = float((batch.rewards[i] - rewards.mean()) / (rewards.std(ddof=1) + 1e-6))
        reference = behaviour[at] if correction["type"] == "none" else old[at]
        ratio = (logp[at] - reference).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        rho = (old[at] - behaviour[at]).exp()
        match correction["type"]:
            case "none":
                rho = torch.ones_like(rho)
            case "truncated" if correction.get("level") == "sequence":
                rho = rho.prod().clamp(max=correction["cap"]).expand_as(rho)
            case "truncated":
                rho = rho.clamp(max=correction["cap"])
            case "icepop":
                rho = torch.where((rho >= correction["low"]) & (rho <= correction["high"]), rho, 0.0)
        share = 1 / len(at) if objective.get("loss") == "sequence" else 1.0
        total = total - share * (rho * surrogate).sum()
        responses += 1
    return total / (responses if objective.get("loss") == "sequence" else int(mask.sum()))


def gradient_of(model, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named_weights(model).values()))])


# --- the objective -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("loss", ["token", "sequence"])
def test_dapo_equals_its_formulas_in_both_updates(correction: str, loss: str) -> None:
    """The second update is off-policy: its `old` must be the policy of the step's start, not that of the update."""
    objective = {"correction": CORRECTIONS[correction], "loss": loss}
    batches = [near_policy(make_batch(GROUPS, seed=seed), seed) for seed in (1, 2)]
    versions = np.random.default_rng(3).integers(0, 4, len(batches[1].tokens)).astype(np.int32)
    batches = [
        Batch(
            **{name: getattr(b, name) for name in b.__struct_fields__}
            | {"step": 4, "versions": versions[: len(b.tokens)]}
        )
        for b in batches
    ]
    masks = [3 - b.versions <= 2 for b in batches]
    model = tiny_model()
    start = [padded_logprobs(model, batch).detach() for batch in batches]
    config = make_config(objective=objective, max_lag=2, token_budget=30, grad_clip=0.0, updates_per_step=2)
    first_loss = plain_loss(model, batches[0], objective, old=start[0], mask=masks[0], temperature=1.0)
    first_gradient = gradient_of(model, first_loss)
    learner = TorchLearner(config, model)
    metrics = learner.step(4, batches[:1])
    torch.testing.assert_close(learner.optimizer.gradient, first_gradient, atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(first_loss.item(), abs=1e-5)

    second_loss = plain_loss(model, batches[1], objective, old=start[1], mask=masks[1], temperature=1.0)
    second_gradient = gradient_of(model, second_loss)
    learner = TorchLearner(config, both := tiny_model())
    metrics = learner.step(4, batches)
    torch.testing.assert_close(learner.optimizer.gradient, second_gradient, atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx((first_loss.item() + second_loss.item()) / 2, abs=1e-5)
    assert metrics["updates"] == 2
    assert not same_bits(weights_of(both), weights_of(model))


def test_temperature_of_sampling_is_the_temperature_of_training() -> None:
    batch, model = near_policy(make_batch(GROUPS)), tiny_model()
    config = make_config(objective={"correction": CORRECTIONS["none"]}, temperature=0.7, grad_clip=0.0)
    mask = np.ones(len(batch.tokens), bool)
    expected = plain_loss(model, batch, {}, old=torch.zeros(len(mask)), mask=mask, temperature=0.7).item()
    assert TorchLearner(config, model).step(1, [batch])["loss"] == pytest.approx(expected, abs=1e-5)


def test_overlong_filter_masks_truncated_responses_but_keeps_their_rewards() -> None:
    batch = near_policy(make_batch(GROUPS, truncated=np.arange(12) % 3 == 0))
    objective = {"correction": CORRECTIONS["none"], "overlong_filter": True}
    mask = ~np.repeat(batch.truncated, batch.lengths)
    model = tiny_model()
    expected = plain_loss(model, batch, objective, old=torch.zeros(len(mask)), mask=mask, temperature=1.0).item()
    metrics = TorchLearner(make_config(objective=objective), model).step(1, [batch])
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["masked_fraction"] == pytest.approx(1 - mask.mean())
    assert metrics["trained_tokens"] == mask.sum()


def test_supervised_loss_is_the_mean_over_tokens_and_falls() -> None:
    batch, model = make_batch([(5, [3]), (2, [9]), (7, [1])], rewards=np.ones(3, np.float32)), tiny_model()
    learner = TorchLearner(make_config(objective={"type": "sft"}), model)
    expected = -padded_logprobs(model, batch).mean().item()
    losses = [learner.step(step, [batch])["loss"] for step in range(1, 11)]
    assert losses[0] == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_right_responses_become_likelier() -> None:
    batch, model = near_policy(make_batch(GROUPS)), tiny_model()
    learner = TorchLearner(make_config(weight_decay=0.0, lr=1e-3), model)
    before = padded_logprobs(model, batch).detach()
    learner.step(1, [batch])
    change = (padded_logprobs(model, batch).detach() - before).numpy()
    right = np.repeat(batch.correct, batch.lengths)
    assert change[right].mean() > 0 > change[~right].mean()


# --- the cut does not matter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["token", "sequence"])
def test_token_budget_does_not_change_loss_and_gradient(loss: str) -> None:
    batch = near_policy(make_batch(GROUPS))
    results = []
    for token_budget in (8, 40, 10_000):
        config = make_config(objective={"loss": loss}, token_budget=token_budget, grad_clip=0.0)
        learner = TorchLearner(config, tiny_model())
        metrics = learner.step(1, [batch])
        metrics.pop("prompt_tokens_saved")
        results.append((metrics, learner.optimizer.gradient))
    for metrics, gradient in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two gloo processes left the results of `learner_rank.JOBS`."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = learner_rank.__file__
    ranks = [subprocess.Popen([sys.executable, script, str(rank), str(folder)], env=environment) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return folder


@pytest.mark.parametrize("job", ["token", "sequence", "ppo", "ppo-sequence"])
def test_two_ranks_get_the_gradients_of_one(job: str, two_ranks: Path) -> None:
    metrics, alone = learner_rank.train(job, 0, 1)
    first, second = (load_file(two_ranks / f"{job}{rank}.safetensors") for rank in (0, 1))
    assert same_bits(first, second)
    for name in [name for name in alone if name.endswith("gradient")]:
        torch.testing.assert_close(first[name], alone[name], atol=2e-6, rtol=1e-4)
    shared = [json.loads((two_ranks / f"{job}{rank}.json").read_text()) for rank in (0, 1)]
    assert shared[0] == shared[1]
    assert shared[0] == pytest.approx(metrics, abs=1e-4)


def test_a_rank_with_bad_numbers_stops_all_ranks(two_ranks: Path) -> None:
    for rank in (0, 1):
        error = (two_ranks / f"poison{rank}.error").read_text()
        assert f"learner rank {rank}: step 1, update 1 of 2: policy: not finite" in error


def test_ranks_of_different_versions_are_refused_on_each(two_ranks: Path) -> None:
    expected = (
        "learner ranks differ: rank 0 has torch 2.13.0, DeepSpeed 0.19.7; rank 1 has torch 2.13.0, DeepSpeed 0.19.8;"
    )
    for rank in (0, 1):
        assert (two_ranks / f"versions{rank}.error").read_text().startswith(expected)


# --- masked and bad data -------------------------------------------------------------------------------------------


def test_an_update_without_loss_tokens_changes_nothing() -> None:
    batch, model = make_batch(GROUPS, step=9, versions=np.zeros(55, np.int32)), tiny_model()
    before = weights_of(model)
    metrics = TorchLearner(make_config(), model).step(9, [batch])
    assert same_bits(weights_of(model), before)
    assert (metrics["updates"], metrics["masked_fraction"], metrics["stale_fraction"]) == (0, 1, 1)
    assert all(math.isfinite(value) for name, value in metrics.items() if not name.startswith("ratio"))


def test_tokens_of_the_future_are_refused() -> None:
    with pytest.raises(ValueError, match="step 3: a token of version 3, expected at most 2"):
        TorchLearner(make_config(), tiny_model()).step(3, [make_batch(GROUPS, step=4)])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    batch, model = make_batch(GROUPS, rewards=np.full(12, np.inf, np.float32)), tiny_model()
    before = weights_of(model)
    learner = TorchLearner(make_config(max_lag=9), model)
    with pytest.raises(
        NonFiniteError, match=r"rank 0: step 7, update 1 of 2: policy: not finite: the loss \(nan\) and the gradient of"
    ):
        learner.step(7, [batch, batch])
    assert same_bits(weights_of(model), before)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = tiny_model("qwen2")
    learner = TorchLearner(make_config(), model)
    model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"the gradient of 1 weights, the first is lm_head\.weight"):
        learner.step(1, [near_policy(make_batch(GROUPS))])


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_a_step() -> None:
    versions = np.random.default_rng(3).integers(0, 4, 55).astype(np.int32)
    batch = near_policy(make_batch(GROUPS, step=4, versions=versions))
    model = tiny_model()
    logp = padded_logprobs(model, batch).detach().double().numpy()
    objective = {"correction": {"type": "truncated", "cap": 1.1}}
    metrics = TorchLearner(make_config(objective=objective, max_lag=2), model).step(4, [batch])
    lags = 3 - versions
    mask = lags <= 2
    ratio = np.exp(logp - batch.logprobs)[mask]
    expected = {
        "kl_behaviour": (ratio - 1 - np.log(ratio)).mean(),
        "weight_mean": np.minimum(ratio, 1.1).mean(),
        "weight_capped_fraction": (ratio >= 1.1).mean(),
        "ratio_p50": np.quantile(ratio, 0.5, method="inverted_cdf"),
        "ratio_p01": np.quantile(ratio, 0.01, method="inverted_cdf"),
        "ratio_p99": np.quantile(ratio, 0.99, method="inverted_cdf"),
        "lag_mean": lags.mean(),
        "lag_max": 3,
        "lag_p99": 3,
        "masked_fraction": (~mask).mean(),
        "stale_fraction": (~mask).mean(),
        "trained_tokens": mask.sum(),
        "length_mean": 55 / 12,
        "reward_mean": batch.rewards.mean(),
        "accuracy": batch.correct.mean(),
        "clip_fraction_high": 0,
        "prompt_tokens_saved": 1 - (21 + 43) / (5 * 4 + 1 * 2 + 12 * 4 + 3 * 2 + 43),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=5e-3, abs=1e-6)
    assert metrics.keys() >= PROMISED
    assert all(type(value) is float for value in metrics.values())
