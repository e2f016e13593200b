"""Losses against published numbers, and: the split of a batch does not matter, masked tokens do not either."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.logprobs import token_logprobs
from engine.losses import clipped_surrogate, icepop_weights, positive_nll, truncated_weights, value_loss

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))
CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def padded(rows: list[list[float]], fill: float = math.nan) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths as ([B, T], mask), garbage behind their ends."""
    length = max(map(len, rows))
    mask = torch.tensor([[t < len(row) for t in range(length)] for row in rows])
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows]), mask


# --- the clipped surrogate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_higher(dtype: torch.dtype) -> None:
    inputs, expected = VECTORS["A1"]["inputs"], VECTORS["A1"]["expected"]
    logp = torch.tensor([inputs["r"]], dtype=dtype).log().requires_grad_()
    advantages = torch.tensor([inputs["A"]], dtype=dtype)
    mask = torch.ones_like(advantages, dtype=torch.bool)
    loss, metrics = clipped_surrogate(logp, torch.zeros_like(logp), advantages, mask, **CLIPS, denominator=1)
    loss.backward()
    assert loss.item() == pytest.approx(sum(expected["loss"]), abs=1e-4)
    assert logp.grad is not None
    torch.testing.assert_close(-logp.grad[0], torch.tensor(expected["dJ_dlogp"], dtype=dtype), atol=1e-5, rtol=1e-5)
    assert {name: int(count) for name, count in metrics.items()} == {
        "tokens": 11, "clipped_high": 2, "clipped_low": 2, "clipped_dual": 0,
    }  # fmt: skip


@pytest.mark.parametrize("clip", [0.1, 0.2, 0.22, 0.28, 0.3])
def test_a_ratio_at_its_bound_is_clipped_whatever_the_rounding(clip: float) -> None:
    logp = torch.tensor([[1 + clip, 1 - clip]]).log().requires_grad_()
    for shift in (0.0, -1.7, -12.3):
        loss, _ = clipped_surrogate(
            logp + shift, torch.full_like(logp, shift), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2),
            clip_low=clip, clip_high=clip, denominator=1,
        )  # fmt: skip
        assert not torch.autograd.grad(loss, logp)[0].any()


@pytest.mark.parametrize(("dual_clip", "column"), [(3.0, "loss_c3"), (10.0, "loss_c10"), (None, "loss_no_dual")])
def test_dual_clip(dual_clip: float | None, column: str) -> None:
    inputs, expected = VECTORS["A2"]["inputs"], VECTORS["A2"]["expected"][column]
    logp = torch.tensor([inputs["r"]]).log().requires_grad_()
    advantages, mask = torch.full_like(logp, inputs["A"]), torch.ones_like(logp, dtype=torch.bool)
    arguments = {**CLIPS, "denominator": 1, "dual_clip": dual_clip}
    loss, metrics = clipped_surrogate(logp, torch.zeros_like(logp), advantages, mask, **arguments)
    loss.backward()
    assert loss.item() == pytest.approx(sum(expected), abs=1e-4)
    clipped = [dual_clip is not None and r >= dual_clip for r in inputs["r"]]
    assert metrics["clipped_dual"].item() == sum(clipped)
    assert logp.grad is not None
    assert [g == 0 for g in logp.grad[0].tolist()] == [c or r <= 0.8 for c, r in zip(clipped, inputs["r"], strict=True)]


def test_dual_clip_of_one_or_less_is_refused() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="dual_clip: got 1"):
        clipped_surrogate(ones, ones, ones, ones, **CLIPS, denominator=1, dual_clip=1.0)


def test_global_token_mean_over_ranks_and_micro_batches() -> None:
    """With ratio 1 a token's loss is minus its advantage, so that the published per-token losses can be fed in."""
    vector = VECTORS["B2"]
    losses = []
    for micro_batches in vector["inputs"]["micro_batches"].values():
        for micro_batch in micro_batches:
            advantages = -torch.tensor(micro_batch)
            zeros, mask = torch.zeros_like(advantages), torch.ones_like(advantages)
            loss, _ = clipped_surrogate(
                zeros, zeros, advantages, mask, **CLIPS, denominator=vector["inputs"]["N_global"]
            )
            losses.append(loss.item())
    assert sum(losses) == pytest.approx(vector["expected"]["global_token_mean"])


def test_token_mean_and_sequence_mean() -> None:
    inputs, expected = VECTORS["B1"]["inputs"]["losses"], VECTORS["B1"]["expected"]
    token_losses, mask = padded(inputs)
    zeros, share = torch.zeros_like(token_losses), 1 / mask.sum(1, keepdim=True).expand_as(token_losses)
    token, _ = clipped_surrogate(zeros, zeros, -token_losses, mask, **CLIPS, denominator=mask.sum())
    assert token.item() == pytest.approx(expected["token-mean"])
    sequence, _ = clipped_surrogate(zeros, zeros, -token_losses, mask, **CLIPS, denominator=3, weights=share)
    assert sequence.item() == pytest.approx(expected["seq-mean-token-mean"])


@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 8), max_size=4), dual=st.sampled_from([None, 3.0]))
@settings(max_examples=40, deadline=None)
def test_any_split_adds_up_to_the_same_loss_gradient_and_counts(seed: int, cuts: list[int], dual: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, advantages, weights = (torch.randn(8, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(8, 5, generator=generator) < 0.7
    start = old + 0.5 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    results = []
    for bounds in ([0, 8], [0, *sorted(cuts), 8]):
        logp = start.clone().requires_grad_()
        loss, counts = 0.0, dict.fromkeys(("tokens", "clipped_high", "clipped_low", "clipped_dual"), 0.0)
        for a, b in pairwise(bounds):
            part, metrics = clipped_surrogate(
                logp[a:b], old[a:b], advantages[a:b], mask[a:b], **CLIPS,
                denominator=max(1, mask.sum()), dual_clip=dual, weights=weights[a:b].abs(),
            )  # fmt: skip
            loss = loss + part
            counts = {name: counts[name] + metrics[name].item() for name in counts}
        loss.backward()
        results.append((loss.item(), logp.grad, counts))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_log_ratios_are_held_within_twenty() -> None:
    logp = torch.tensor([[0.0, -100.0]], requires_grad=True)
    loss, _ = clipped_surrogate(
        logp, torch.tensor([[-100.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), **CLIPS, denominator=1
    )
    assert loss.item() == pytest.approx(math.exp(20) - math.exp(-20), rel=1e-6)


# --- masked tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_reach_neither_losses_nor_gradients(garbage: float) -> None:
    mask = torch.tensor([[True, False, True], [False, True, False]])
    good = torch.tensor([[-1.0, 0.0, -2.0], [0.0, -0.5, 0.0]])
    bad = torch.where(mask, good, garbage)
    both = []
    for x in (good, bad):
        logp, values = x.clone().requires_grad_(), x.clone().requires_grad_()
        surrogate, metrics = clipped_surrogate(logp, x - 0.1, x, mask, **CLIPS, denominator=3, weights=x)
        squared, value_metrics = value_loss(values, x + 1, x - 1, mask, clip=0.2, denominator=3)
        nll = positive_nll(logp, mask, torch.tensor([True, True]), denominator=3)
        (surrogate + squared + nll).backward()
        weights = (
            truncated_weights(x, x - 0.1, mask), truncated_weights(x, x - 0.1, mask, level="sequence"),
            icepop_weights(x, x - 0.1, mask, low=0.5, high=2.0),
        )  # fmt: skip
        both.append(
            (surrogate, squared, nll, logp.grad, values.grad, *weights, *metrics.values(), *value_metrics.values())
        )
    for a, b in zip(*both, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert not both[1][3][~mask].any()


def test_nothing_at_all_is_a_loss_of_zero() -> None:
    logp, mask = torch.full((2, 3), math.nan, requires_grad=True), torch.zeros(2, 3)
    loss, _ = clipped_surrogate(logp, logp, logp, mask, **CLIPS, denominator=0)
    loss = loss + positive_nll(logp, mask, torch.tensor([True, False]), denominator=0)
    loss = loss + value_loss(logp, logp, logp, mask, clip=None, denominator=0)[0]
    loss.backward()
    assert loss.item() == 0
    assert logp.grad is not None
    assert not logp.grad.any()


# --- the other losses ----------------------------------------------------------------------------------------------


def test_value_loss() -> None:
    inputs, expected = VECTORS["G2"]["inputs"], VECTORS["G2"]["expected"]
    values, old, returns = (torch.tensor([inputs[name]]) for name in ("V_pred", "V_old", "R"))
    mask = torch.ones(1, 3)
    loss, metrics = value_loss(values, old, returns, mask, clip=None, denominator=3)
    assert loss.item() == pytest.approx(expected["loss_unclipped"])
    assert metrics["clipped"].item() == 0
    loss, metrics = value_loss(values, old, returns, mask, clip=inputs["cliprange_value"], denominator=3)
    assert loss.item() == pytest.approx(expected["loss_clipped"], abs=1e-6)
    assert metrics["clipped"].item() / metrics["tokens"].item() == pytest.approx(expected["clipfrac"], abs=1e-6)


def test_positive_nll_counts_right_answers_only() -> None:
    logp, mask = padded([[-1.0, -2.0], [-5.0], [-3.0, -4.0, -5.0]])
    loss = positive_nll(logp, mask, torch.tensor([True, False, True]), denominator=5)
    assert loss.item() == pytest.approx(3.0)


# --- weights -------------------------------------------------------------------------------------------------------


def test_importance_weights() -> None:
    inputs, expected = VECTORS["H1"]["inputs"], VECTORS["H1"]["expected"]
    log_rho, mask = padded(inputs["log_rho"])
    behaviour = torch.full_like(log_rho, -3.0)
    old = (behaviour + log_rho).requires_grad_()
    low, high = inputs["icepop"]
    got = {
        "rho": truncated_weights(old, behaviour, mask, cap=math.inf),
        "token_tis": truncated_weights(old, behaviour, mask, cap=inputs["C"]),
        "icepop": icepop_weights(old, behaviour, mask, low=low, high=high),
    }
    for name, weights in got.items():
        assert not weights.requires_grad
        torch.testing.assert_close(weights, padded(expected[name], fill=0.0)[0], atol=1e-5, rtol=0)
    sequence = truncated_weights(old, behaviour, mask, cap=inputs["C"], level="sequence")
    torch.testing.assert_close(sequence, torch.tensor(expected["seq_tis"])[:, None] * mask, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="level: got 'group'"):
        truncated_weights(old, behaviour, mask, level="group")


# --- log-probabilities in blocks of the vocabulary -----------------------------------------------------------------


@given(
    tokens=st.integers(0, 20), vocabulary=st.integers(2, 50), chunk=st.sampled_from([1, 37, 200, 10_000]),
    temperature=st.sampled_from([1.0, 0.6]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_token_logprobs_equal_the_plain_form(
    tokens: int, vocabulary: int, chunk: int, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 8, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 8, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    logp, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, chunk_elements=chunk)
    plain = (hidden @ weight.T / temperature).log_softmax(-1)
    picked = plain.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, picked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(plain.exp() * plain).sum(-1), atol=1e-5, rtol=1e-5)
    assert not entropy.requires_grad
    upstream = torch.randn(tokens, generator=generator)
    ours = torch.autograd.grad(logp, (hidden, weight), upstream)
    for got, expected in zip(ours, torch.autograd.grad(picked, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_token_logprobs_of_bfloat16_have_float32_logits() -> None:
    hidden, weight = torch.randn(30, 64).bfloat16().requires_grad_(), torch.randn(200, 64).bfloat16().requires_grad_()
    targets = torch.randint(200, (30,))
    logp, _ = token_logprobs(hidden, weight, targets, chunk_elements=1000)
    plain = (hidden.float() @ weight.float().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, plain, atol=1e-4, rtol=0)
    ours = torch.autograd.grad(logp.sum(), (hidden, weight))
    for got, expected in zip(ours, torch.autograd.grad(plain.sum(), (hidden, weight)), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


def test_token_logprobs_never_hold_all_logits() -> None:
    """Extreme logits need the online maximum; what autograd keeps has no axis of the vocabulary but the weight."""
    hidden, weight = (100 * torch.randn(12, 4)).requires_grad_(), torch.randn(3000, 4)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        logp, entropy = token_logprobs(hidden, weight, torch.arange(12), chunk_elements=600)
    assert torch.isfinite(logp).all()
    assert torch.isfinite(entropy).all()
    assert [shape for shape in saved if 3000 in shape] == [weight.shape]
