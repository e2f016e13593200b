"""Draws: counter-based uniforms, exact inverse distribution function, truncation equal to its plain definition."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling import draw, invert, sequence_key, truncate, uniforms


def plain_truncation(probabilities: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """One row: the definition, token by token, ties with the last kept one kept."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    order = order[: top_k or len(order)]
    whole, held, threshold = sum(probabilities[order]), 0.0, 0.0
    for token in order:
        if held >= top_p * whole:
            break
        held, threshold = held + probabilities[token], probabilities[token]
    return np.where(probabilities >= threshold, probabilities, 0.0)


def draw_one(logits: torch.Tensor, uniform: np.ndarray, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    settings_ = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} | options
    rows = {name: np.full(len(logits), value) for name, value in settings_.items()}
    return draw(logits, uniform, temperature=rows["temperature"], top_p=rows["top_p"], top_k=rows["top_k"])


def test_uniforms_are_a_function_of_seed_sample_and_position_alone() -> None:
    keys = np.array([sequence_key(seed, sample) for seed in range(20) for sample in range(20)], dtype=np.uint64)
    assert len(set(keys.tolist())) == 400
    together = uniforms(keys, np.arange(400))
    alone = [uniforms(keys[i : i + 1], np.array([i]))[0] for i in range(400)]
    assert together.tolist() == alone
    assert sequence_key(2**64 + 5, 1) == sequence_key(5, 1)  # a seed is taken modulo 2**64
    assert sequence_key(-1, 0) == sequence_key(2**64 - 1, 0)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    keys = np.array([sequence_key(7, sample) for sample in range(64)], dtype=np.uint64)
    grid = np.stack([uniforms(keys, np.full(64, position)) for position in range(1024)])
    assert 0.0 <= grid.min() < grid.max() < 1.0
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    expected = grid.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square, 63 degrees of freedom: p < 2e-5
    for a, b in [(grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2**32 - 1))
def test_invert_is_the_inverse_distribution_function(vocabulary: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(8, vocabulary)) * (rng.random((8, vocabulary)) < 0.5)
    weights[:, rng.integers(vocabulary)] += 0.1
    probabilities = torch.from_numpy((weights / weights.sum(-1, keepdims=True)).astype(np.float32))
    uniform = rng.random(8)
    uniform[:2] = [0.0, 1.0 - 2.0**-53]
    tokens = invert(probabilities, torch.from_numpy(uniform))
    running = probabilities.double().cumsum(-1).numpy()
    for row, token in enumerate(tokens.tolist()):
        assert probabilities[row, token] > 0
        target = uniform[row] * running[row, -1]
        before = running[row, token - 1] if token else 0.0
        assert before - 1e-6 <= target <= running[row, token] + 1e-6


def test_drawn_frequencies_are_the_probabilities() -> None:
    logits = torch.randn(1, 1500, generator=torch.Generator().manual_seed(3)) * 3
    keys = np.array([sequence_key(11, sample) for sample in range(20_000)], dtype=np.uint64)
    tokens, _ = draw_one(logits.expand(20_000, -1), uniforms(keys, np.zeros(20_000)), temperature=0.8)
    expected = torch.softmax(logits[0] / 0.8, -1) * 20_000
    often = expected > 20
    counts = torch.bincount(tokens, minlength=1500)
    degrees = int(often.sum())
    chi_square = float(((counts - expected) ** 2 / expected)[often].sum())
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 0.999, 1.0]),
    st.sampled_from([0, 1, 2, 50, 129, 400, 1000]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_truncation_is_its_definition(vocabulary: int, top_p: float, top_k: int, ties: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Multiples of a power of two, so that sums are exact and the comparison is too.
    counts = rng.integers(1, 4 if ties else 10_000, size=(3, vocabulary)).astype(np.float64)
    counts[:, 0] += 2.0**22 - counts.sum(-1)
    probabilities = torch.from_numpy((counts / 2.0**22).astype(np.float32))
    got = truncate(probabilities, top_p=np.full(3, top_p), top_k=np.full(3, top_k))
    mass = float(np.float32(top_p))
    for row in range(3):
        np.testing.assert_array_equal(got[row].numpy(), plain_truncation(probabilities[row].numpy(), mass, top_k))


def test_top_p_is_a_share_of_what_top_k_leaves() -> None:
    weights = 1 / np.arange(1, 2001) ** 1.5
    probabilities = torch.from_numpy((weights / weights.sum()).astype(np.float32))[None]
    for top_k in (2, 1500):  # the second needs more candidates than those looked at first
        got = truncate(probabilities, top_p=np.array([0.7]), top_k=np.array([top_k]))[0].numpy()
        np.testing.assert_array_equal(got, plain_truncation(probabilities[0].numpy(), 0.7, top_k))


def test_truncation_differs_per_row_and_leaves_the_logprob_alone() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(5)) * 2
    uniform = np.array([0.999, 0.999, 0.999, 0.999])
    tokens, logprobs = draw(
        logits,
        uniform,
        temperature=np.array([1.0, 0.5, 1.0, 2.0]),
        top_p=np.array([1.0, 1.0, 0.2, 1.0]),
        top_k=np.array([0, 0, 0, 1]),
    )
    full = torch.log_softmax(logits / torch.tensor([1.0, 0.5, 1.0, 2.0])[:, None], -1)
    torch.testing.assert_close(logprobs, full.gather(-1, tokens[:, None])[:, 0])
    assert tokens[3] == logits[3].argmax()
    nucleus = plain_truncation(full[2].exp().numpy(), 0.2, 0)
    assert nucleus[int(tokens[2])] > 0
    assert logprobs.dtype == torch.float32


def test_a_row_of_nan_is_visible_in_its_logprob_and_spares_the_others() -> None:
    logits = torch.zeros(2, 1000)
    logits[0] = torch.nan
    tokens, logprobs = draw_one(logits, np.array([0.5, 0.5005]))
    assert torch.isnan(logprobs[0])
    assert tokens[1] == 500
    assert abs(float(logprobs[1]) + np.log(1000)) < 1e-5
