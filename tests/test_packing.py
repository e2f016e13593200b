"""Dealing groups out, and rows without padding: same numbers as one padded sequence a response."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_cases import KINDS, make_batch, padded_logprobs, tiny_model

from engine import packed_attention
from engine.logprobs import token_logprobs
from engine.models import hidden_states, output_weight
from engine.packing import assign, pack
from protocols.messages import Batch, GroupSize

sizes = st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=1, max_size=6)), min_size=1, max_size=12)  # fmt: skip
MIXED = [(5, [3, 1, 9]), (1, [1]), (12, [2, 30, 4, 7]), (3, [1, 1])]


def packed_logprobs(model, batch: Batch, token_budget: int, weights: np.ndarray | None = None) -> torch.Tensor:
    """[N]; with `weights` [N] also adds the gradient of the weighted sum to the model."""
    result = torch.zeros(len(batch.tokens))
    for micro_batch in pack(batch, token_budget=token_budget, device="cpu"):
        hidden = hidden_states(model, micro_batch.ids, micro_batch.positions, micro_batch.attention)
        logp, _ = token_logprobs(hidden[micro_batch.predictors], output_weight(model), micro_batch.targets)
        result[micro_batch.tokens] = logp.detach()
        if weights is not None:
            (logp * torch.from_numpy(weights[micro_batch.tokens])).sum().backward()
    return result


def gradients(model) -> dict[str, torch.Tensor]:
    taken = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return taken


# --- the row -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_budget", [10, 40, 1000])
def test_same_logprobs_and_gradients_as_padded(kind: str, token_budget: int) -> None:
    model, batch = tiny_model(kind), make_batch(MIXED)
    weights = np.random.default_rng(1).normal(size=len(batch.tokens)).astype(np.float32) / len(batch.tokens)
    packed = packed_logprobs(model, batch, token_budget, weights)
    ours = gradients(model)
    plain = padded_logprobs(model, batch)
    (plain * torch.from_numpy(weights)).sum().backward()
    torch.testing.assert_close(packed, plain.detach(), atol=1e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_long_segments_are_cut_into_query_pieces() -> None:
    batch = make_batch([(packed_attention.QUERY_BLOCK + 5, [1, packed_attention.QUERY_BLOCK + 40, 3])])
    model = tiny_model()
    weights = np.full(len(batch.tokens), 1 / len(batch.tokens), np.float32)
    packed = packed_logprobs(model, batch, 10_000, weights)
    ours = gradients(model)
    plain = padded_logprobs(model, batch)
    (plain * torch.from_numpy(weights)).sum().backward()
    torch.testing.assert_close(packed, plain.detach(), atol=1e-5, rtol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            ours[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_bfloat16_is_close_to_padded_bfloat16() -> None:
    model, batch = tiny_model(dtype=torch.bfloat16), make_batch(MIXED)
    packed = packed_logprobs(model, batch, 1000)
    torch.testing.assert_close(packed, padded_logprobs(model, batch).detach(), atol=0.15, rtol=0)


def test_every_run_gives_the_same_bits() -> None:
    model, batch = tiny_model(), make_batch(MIXED)
    weights = np.ones(len(batch.tokens), np.float32)
    runs = []
    for _ in range(2):
        logp = packed_logprobs(model, batch, 40, weights)
        runs.append([logp, *gradients(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_row_has_each_prompt_once_and_no_last_token() -> None:
    batch = make_batch([(4, [3, 1, 2])])
    (micro_batch,) = pack(batch, token_budget=100, device="cpu")
    tokens = batch.tokens
    expected = np.concatenate([batch.prompts, tokens[0:2], tokens[4:5]])
    np.testing.assert_array_equal(micro_batch.ids, expected)
    np.testing.assert_array_equal(micro_batch.positions, [0, 1, 2, 3, 4, 5, 4])
    np.testing.assert_array_equal(micro_batch.predictors, [3, 4, 5, 3, 3, 6])
    np.testing.assert_array_equal(micro_batch.targets, tokens)


@given(groups=sizes, budget=st.integers(8, 200))
@settings(max_examples=60, deadline=None)
def test_packs_cover_each_token_once_within_the_budget(groups: list[tuple[int, list[int]]], budget: int) -> None:
    batch = make_batch(groups)
    packs = pack(batch, token_budget=budget, device="cpu")
    assert sorted(np.concatenate([p.tokens for p in packs]).tolist()) == list(range(len(batch.tokens)))
    assert sorted(np.concatenate([p.responses for p in packs]).tolist()) == list(range(len(batch.lengths)))
    whole = [prompt + sum(own) - len(own) for prompt, own in groups]
    for micro_batch in packs:
        assert len(micro_batch.ids) <= budget or len(micro_batch.responses) == 1
        np.testing.assert_array_equal(micro_batch.targets, batch.tokens[micro_batch.tokens])
        rows = micro_batch.column(np.arange(len(batch.tokens), dtype=np.float32) + 1)
        assert (rows > 0).sum(1).tolist() == batch.lengths[micro_batch.responses].tolist()
        assert all(row[row > 0].diff().eq(1).all() for row in rows)
    if max(whole) <= budget:  # nothing needs to be cut: every prompt exactly once
        assert sum(len(p.ids) for p in packs) == sum(whole)


@given(groups=sizes)
@settings(max_examples=60, deadline=None)
def test_attention_blocks_cover_each_query_once_with_bounded_waste(groups: list[tuple[int, list[int]]]) -> None:
    (micro_batch,) = pack(make_batch(groups), token_budget=1 << 20, device="cpu")
    blocks = micro_batch.attention.blocks
    rows = torch.cat([block.rows for block in blocks])
    assert rows.sort().values.tolist() == list(range(len(micro_batch.ids)))
    for block in blocks:
        real = torch.zeros(block.pieces * block.queries, dtype=torch.bool).index_fill_(0, block.real, True)
        seen = block.mask()[:, 0] & real.view(block.pieces, block.queries, 1)
        last_keys = seen.sum(2)[real.view(block.pieces, -1)]
        np.testing.assert_array_equal(
            last_keys - 1, micro_batch.positions[block.rows]
        )  # sees as many as it has positions
        needed = float((seen.any(2).sum(1) * seen.sum(2).amax(1)).sum())
        area = block.pieces * block.queries * block.keys
        assert area <= packed_attention.WASTE * needed + packed_attention.FREE_AREA or block.pieces == 1


def test_an_empty_batch_has_no_packs() -> None:
    assert pack(make_batch([]), token_budget=100, device="cpu") == []


# --- dealing out ---------------------------------------------------------------------------------------------------


@given(groups=sizes, updates=st.integers(1, 4), ranks=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_assign_deals_every_group_once_and_evenly(groups, updates: int, ranks: int) -> None:
    plan = [GroupSize(100 + i, prompt, own) for i, (prompt, own) in enumerate(groups)]
    if len(plan) < updates:
        with pytest.raises(ValueError, match=rf"{len(plan)} groups for {updates} updates"):
            assign(plan, updates=updates, ranks=ranks)
        return
    dealt = assign(plan, updates=updates, ranks=ranks)
    assert dealt == assign(plan, updates=updates, ranks=ranks)
    assert sorted(group for update in dealt for share in update for group in share) == [size.group for size in plan]
    counts = [sum(len(share) for share in update) for update in dealt]
    assert max(counts) - min(counts) <= 1
    weigh = {size.group: size.prompt_tokens + sum(size.response_tokens) for size in plan}
    for update in dealt:
        loads = [sum(weigh[group] for group in share) for share in update]
        heaviest = max(weigh[group] for share in update for group in share)
        assert max(loads) - min(loads) <= heaviest
        assert all(share == sorted(share) for share in update)


def test_assign_balances_updates_by_tokens() -> None:
    plan = [GroupSize(i, 10, [length]) for i, length in enumerate([1000, 1, 500, 490, 2, 1000, 480, 500])]
    loads = [sum(10 + plan[g].response_tokens[0] for g in update[0]) for update in assign(plan, updates=2, ranks=1)]
    assert max(loads) / min(loads) < 1.05
