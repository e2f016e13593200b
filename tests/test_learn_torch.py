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
from learner_cases import make_batch, make_config, padded_logprobs, tiny_model
from safetensors.torch import load_file

from engine.histograms import (
    lag_histogram,
    lag_quantile,
    log_ratio_histogram,
    ratio_quantile,
)
from engine.learn_torch import NonFiniteError, TorchLearner
from engine.models import named_weights
from protocols.messages import Batch

GROUPS = [(5, [3, 1, 9, 2]), (1, [1, 4]), (12, [2, 20, 4, 7]), (3, [1, 1])]
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


def near_policy(batch: Batch, seed: int = 5) -> Batch:
    """The batch with behaviour log-probabilities about those of the tiny model, so that ratios are around 1."""
    noise = np.random.default_rng(seed).normal(scale=0.3, size=len(batch.tokens))
    logp = padded_logprobs(tiny_model(), batch).detach().numpy() + noise
    columns = {name: getattr(batch, name) for name in batch.__struct_fields__}
    return Batch(**columns | {"logprobs": np.minimum(logp, 0).astype(np.float32)})


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


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


@pytest.mark.parametrize("job", ["token", "sequence"])
def test_two_ranks_get_the_gradients_of_one(job: str, two_ranks: Path) -> None:
    metrics, alone = learner_rank.train(job, 0, 1)
    first, second = (load_file(two_ranks / f"{job}{rank}.safetensors") for rank in (0, 1))
    assert same_bits(first, second)
    torch.testing.assert_close(first["gradient"], alone["gradient"], atol=1e-6, rtol=1e-4)
    shared = [json.loads((two_ranks / f"{job}{rank}.json").read_text()) for rank in (0, 1)]
    assert shared[0] == shared[1]
    assert shared[0] == pytest.approx(metrics, abs=1e-4)


def test_a_rank_with_bad_numbers_stops_all_ranks(two_ranks: Path) -> None:
    for rank in (0, 1):
        error = (two_ranks / f"poison{rank}.error").read_text()
        assert f"learner rank {rank}: step 1, update 1 of 2: not finite" in error


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
        NonFiniteError, match=r"rank 0: step 7, update 1 of 2: not finite: the loss \(nan\) and the gradient of"
    ):
        learner.step(7, [batch, batch])
    assert same_bits(weights_of(model), before)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = tiny_model("qwen2")
    learner = TorchLearner(make_config(), model)
    model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"the gradient of 1 weights, the first is lm_head\.weight"):
        learner.step(1, [near_policy(make_batch(GROUPS))])


# --- the optimizer -------------------------------------------------------------------------------------------------


def test_warm_up_is_linear_in_rollout_steps() -> None:
    learner = TorchLearner(make_config(lr=0.4, warmup_steps=4), tiny_model())
    rates = [learner.step(step, [make_batch(GROUPS, step=step)] * 2)["lr"] for step in (1, 2, 4, 5, 9)]
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])


def test_gradient_is_clipped_by_its_global_norm() -> None:
    batch = near_policy(make_batch(GROUPS))
    free, held = (TorchLearner(make_config(grad_clip=clip), tiny_model()) for clip in (0.0, 0.01))
    norm = free.step(1, [batch])["grad_norm"]
    assert norm == pytest.approx(free.optimizer.gradient.norm().item())
    assert held.step(1, [batch])["grad_norm"] == pytest.approx(norm)
    assert held.optimizer.gradient.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_training_continues_to_the_same_bits(dtype: str) -> None:
    batches = [make_batch(GROUPS, seed=step, step=step) for step in (1, 2)]
    config = make_config(dtype=dtype, lr=1e-3)
    model = tiny_model(dtype=getattr(torch, dtype))
    learner = TorchLearner(config, model)
    learner.step(1, batches[:1])
    weights = weights_of(model)
    state = {name: tensor.clone() for name, tensor in learner.optimizer_state().items()}
    learner.step(2, batches[1:])

    other = tiny_model(dtype=getattr(torch, dtype))
    resumed = TorchLearner(config, other)
    with torch.no_grad():
        for name, weight in named_weights(other).items():
            weight.copy_(weights[name])
    resumed.load_optimizer_state(state)
    resumed.step(2, batches[1:])
    assert same_bits(weights_of(other), weights_of(model))
    assert same_bits(resumed.optimizer_state(), learner.optimizer_state())


def test_optimizer_state_of_another_model_is_refused() -> None:
    learner = TorchLearner(make_config(), tiny_model())
    state = learner.optimizer_state()
    with pytest.raises(ValueError, match=r"1 tensors are missing or unknown, the first is exp_avg\."):
        learner.load_optimizer_state(
            {name: t for name, t in state.items() if not name.endswith("avg.model.norm.weight")}
        )
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got shape \[3\], expected \[32\]"):
        learner.load_optimizer_state(state | {"exp_avg.model.norm.weight": torch.zeros(3)})


def test_bfloat16_keeps_steps_that_its_weights_cannot_show() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    learner = TorchLearner(make_config(dtype="bfloat16", lr=1e-6, weight_decay=0.0), model)
    weight, master = model.model.norm.weight, learner.optimizer_state()["master.model.norm.weight"]
    before = master.clone()
    learner.step(1, [near_policy(make_batch(GROUPS))])
    assert (master != before).all()  # by about 1e-6 of 1.0, where bfloat16 has steps of 8e-3
    assert (weight == 1).all()
    assert weight.dtype == torch.bfloat16


def test_bfloat16_gradient_is_close_to_float32() -> None:
    batch = near_policy(make_batch(GROUPS))
    learners = [
        TorchLearner(make_config(dtype=str(dtype)[6:], token_budget=20, grad_clip=0.0), tiny_model(dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for learner in learners:
        learner.step(1, [batch])
    exact, rough = (learner.optimizer.gradient for learner in learners)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    batch = near_policy(make_batch(GROUPS))
    kept, remade = (TorchLearner(make_config(gradient_checkpointing=on), tiny_model()) for on in (False, True))
    kept.step(1, [batch])
    forward_passes = []
    remade.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: forward_passes.append(1))
    remade.step(1, [batch])
    assert len(forward_passes) == 2
    torch.testing.assert_close(kept.optimizer.gradient, remade.optimizer.gradient, atol=1e-7, rtol=1e-5)


def test_same_data_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        model = tiny_model()
        learner = TorchLearner(make_config(token_budget=30, updates_per_step=2), model)
        metrics = learner.step(1, [near_policy(make_batch(GROUPS, seed=seed)) for seed in (1, 2)])
        results.append((metrics, weights_of(model)))
    assert results[0][0] == results[1][0]
    assert same_bits(results[0][1], results[1][1])


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


def test_log_ratio_quantiles_of_a_histogram() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-6, 1e-3, 0.1, 5.0):
        values = scale * torch.randn(4001, generator=generator)
        histogram = log_ratio_histogram(values, torch.ones(4001, dtype=torch.bool)).numpy()
        for q in (0.01, 0.5, 0.99):
            exact = float(np.quantile(values.double().numpy(), q, method="inverted_cdf"))
            assert math.log(ratio_quantile(histogram, q)) == pytest.approx(exact, rel=0.01, abs=1e-7)
    assert ratio_quantile(log_ratio_histogram(torch.zeros(3), torch.ones(3, dtype=torch.bool)).numpy(), 0.5) == 1.0
    assert math.isnan(ratio_quantile(np.zeros(4096), 0.5))


def test_lag_quantiles_of_a_histogram() -> None:
    lags = np.array([0] * 98 + [1, 5])
    histogram = lag_histogram(lags)
    assert [lag_quantile(histogram, q) for q in (0.5, 0.99, 1.0)] == [0, 1, 5]
    assert lag_quantile(lag_histogram(np.zeros(0, np.int32)), 0.5) == 0
