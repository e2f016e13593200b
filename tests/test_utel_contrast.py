"""The in-page contrastive loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from engine.utel.pretraining.contrast import contrast

SIZES = [3, 2, 5]
PAGE = torch.repeat_interleave(torch.tensor([0, 4, 7]), torch.tensor(SIZES))


def vectors(seed: int, count: int = sum(SIZES)) -> torch.Tensor:
    return normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).double(), dim=-1)


def test_equal_vectors_cost_ln_n_and_match_nothing() -> None:
    same = vectors(0, 1).expand(sum(SIZES), 8)
    found = contrast(same, same, PAGE, temperature=0.05)
    expected = [math.log(size) for size in SIZES for _ in range(size)]
    assert found.loss.tolist() == pytest.approx(expected)
    assert found.matched.sum() == 0
    assert float(found.cosine / found.pairs) == pytest.approx(1.0)


def test_it_is_the_mean_of_two_cross_entropies_page_by_page() -> None:
    first, second = vectors(1), vectors(2)
    found = contrast(first, second, PAGE, temperature=0.1)
    at, cosines = 0, []
    for size in SIZES:
        own = slice(at, at + size)
        at += size
        logits, labels = first[own] @ second[own].T / 0.1, torch.arange(size)
        both = [cross_entropy(x, labels, reduction="none") for x in (logits, logits.T)]
        assert torch.allclose(found.loss[own], (both[0] + both[1]) / 2)
        right = [(x.argmax(dim=1) == labels).double() for x in (logits, logits.T)]
        assert found.matched[own].tolist() == ((right[0] + right[1]) / 2).tolist()
        cosines.append((logits * 0.1)[~torch.eye(size, dtype=torch.bool)])
    assert float(found.cosine / found.pairs) == pytest.approx(float(torch.cat(cosines).mean()))


def test_other_pages_do_not_count() -> None:
    first, second = vectors(1), vectors(2)
    whole = contrast(first, second, PAGE, temperature=0.05).loss
    alone = contrast(first[3:5], second[3:5], PAGE[3:5], temperature=0.05).loss
    assert torch.allclose(whole[3:5], alone)


def test_the_same_vectors_in_both_views_are_found() -> None:
    first = vectors(3)
    found = contrast(first, first, PAGE, temperature=0.05)
    assert found.matched.sum() == sum(SIZES)
    assert (found.loss < 0.1).all()


def test_a_block_alone_costs_nothing_and_the_gradient_is_finite() -> None:
    page = torch.tensor([0, 1, 1])
    first = vectors(4, 3).requires_grad_()
    found = contrast(first, vectors(5, 3), page, temperature=0.05)
    assert found.loss[0] == 0
    found.loss.sum().backward()
    assert torch.isfinite(first.grad).all()
    assert (first.grad[0] == 0).all()
    assert (first.grad[1] != 0).any()
