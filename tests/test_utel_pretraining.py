"""The joint pretraining loss: it does not depend on how a batch was cut, stays finite without targets, and falls."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.utel.folder import load_utel, save_folder
from engine.utel.model import Utel, UtelConfig
from engine.utel.pretraining.checks import evaluate, leak_checks
from engine.utel.pretraining.config import CweConfig, MllmConfig, PretrainingConfig, SwpConfig
from engine.utel.pretraining.heads import UtelPretraining, vocabulary_nll
from engine.utel.pretraining.objective import MicroBatch, Prepared, Pretraining
from tests.utel_pages import STILL, TINY, make_page, make_pieces

PIECES = make_pieces()
ALL = PretrainingConfig(length=64)
PAIRS = msgspec.structs.replace(ALL, swp=SwpConfig(reading="pair"))
NO_CWE = msgspec.structs.replace(ALL, cwe=CweConfig(weight=0))
PAGES = [make_page(PIECES, count, seed) for seed, count in enumerate([30, 1, 60, 12, 2, 45])]
TASKS = ("mllm", "swp", "cwe")


def make(config: PretrainingConfig, sizes: UtelConfig = STILL) -> tuple[Pretraining, UtelPretraining]:
    torch.manual_seed(0)
    return Pretraining(config, PIECES), UtelPretraining(Utel(sizes), config)


def total(
    objective: Pretraining, model: UtelPretraining, parts: list[Prepared], *, budget: int
) -> tuple[float, dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Loss, gradient and sums of the parts as ranks would have them, each cut into micro-batches of its own."""
    counts = {task: sum(part.counts[task] for part in parts) for task in TASKS}
    sums = {name: np.zeros(length) for name, length in objective.sums.items()}
    model.zero_grad()
    loss = 0.0
    for part in parts:
        for name, values in part.sums.items():
            sums[name] += values
        for batch in objective.micro_batches(part, token_budget=budget):
            one, found = objective.loss(model, batch, counts)
            one.backward()
            loss += one.item()
            for name, value in found.items():
                sums[name] += value.numpy()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, sums


@pytest.mark.parametrize("config", [ALL, PAIRS, NO_CWE], ids=["all", "pairs", "one view"])
def test_the_loss_does_not_depend_on_the_split(config: PretrainingConfig) -> None:
    objective, model = make(config)
    whole = [objective.prepare(PAGES, step=1, seed=0)]
    ranks = [objective.prepare(PAGES[at::3], step=1, seed=0) for at in range(3)]
    ranks.append(objective.prepare([], step=1, seed=0))
    loss, gradient, sums = total(objective, model, whole, budget=100_000)
    split, pieces, other = total(objective, model, ranks, budget=150)
    assert split == pytest.approx(loss, rel=1e-5)
    for name, expected in gradient.items():
        assert torch.allclose(pieces[name], expected, rtol=1e-4, atol=1e-6), name
    assert sums.keys() == other.keys() == objective.sums.keys()
    for name, values in sums.items():
        assert len(values) == objective.sums[name]
        assert np.allclose(other[name], values, rtol=1e-4), name
    assert objective.metrics(sums).keys() == objective.metrics(other).keys()


def test_micro_batches_keep_their_budget_and_lose_nothing() -> None:
    objective, _ = make(ALL)
    prepared = objective.prepare(PAGES, step=1, seed=0)
    batches = objective.micro_batches(prepared, token_budget=300)
    for batch in batches:
        assert batch.inputs.ids.numel() <= 300 or len(batch.inputs.ids) == 2
    assert sum(len(batch.inputs.ids) for batch in batches) == 2 * len(prepared.examples)
    for task in ("mllm", "swp"):
        assert sum(len(getattr(batch, f"{task}_labels")) for batch in batches) == prepared.counts[task] > 0
    assert sum(len(batch.page) for batch in batches) == prepared.counts["cwe"] > 0
    for batch in batches:  # the labels are what stands at the targets, where it was left as it was
        at = batch.inputs.ids.flatten()[batch.mllm_at]
        left = (at != PIECES.mask).float().mean()
        assert left < 1
    assert objective.micro_batches(objective.prepare([], step=1, seed=0), token_budget=300) == []


def test_without_targets_the_loss_is_zero_and_so_is_its_gradient() -> None:
    """One word: nothing is around it and there is nothing to tell it from."""
    config = msgspec.structs.replace(ALL, mllm=MllmConfig(weight=0))
    objective, model = make(config)
    prepared = objective.prepare([PAGES[1]], step=1, seed=0)
    assert prepared.counts == {"mllm": 0, "swp": 0, "cwe": 0}
    loss, gradient, sums = total(objective, model, [prepared], budget=1000)
    assert loss == 0.0
    assert all((values == 0).all() for values in gradient.values())
    assert objective.metrics(sums) == {"positions_per_row": sums["positions"][0] / 2}


def test_a_task_without_targets_here_adds_nothing_to_the_others() -> None:
    objective, model = make(ALL)
    prepared = objective.prepare([PAGES[1]], step=1, seed=0)
    assert prepared.counts["mllm"] > 0
    assert prepared.counts["swp"] == prepared.counts["cwe"] == 0
    [batch] = objective.micro_batches(prepared, token_budget=1000)
    loss, sums = objective.loss(model, batch, prepared.counts)
    assert loss.item() == pytest.approx(sums["mllm_nll"].item() / prepared.counts["mllm"])
    with_others, _ = objective.loss(model, batch, {**prepared.counts, "swp": 7.0, "cwe": 9.0})
    assert with_others.item() == loss.item()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_weights_scale_their_terms() -> None:
    def loss(*weights: float) -> float:
        config = PretrainingConfig(
            mllm=MllmConfig(weight=weights[0]),
            swp=SwpConfig(weight=weights[1]),
            cwe=CweConfig(weight=weights[2]),
            length=64,
        )
        objective, model = make(config)
        if all(weights):
            model.load_state_dict(reference.state_dict())
        prepared = objective.prepare(PAGES, step=1, seed=0)
        return total(objective, model, [prepared], budget=10_000)[0]

    _, reference = make(ALL)
    one, two, three, four = loss(1, 1, 1), loss(2, 1, 1), loss(1, 2, 1), loss(1, 1, 2)
    assert one == pytest.approx((two - one) + (three - one) + (four - one), rel=1e-5)


def test_equal_vectors_cost_ln_n() -> None:
    """A head that says the same of every block: ln N where N are sampled, and no match."""
    config = msgspec.structs.replace(ALL, mllm=MllmConfig(weight=0), swp=SwpConfig(weight=0), length=512)
    objective, model = make(config)
    with torch.no_grad():
        model.cwe.out.weight.zero_()
        model.cwe.out.bias.fill_(1.0)
    prepared = objective.prepare([PAGES[2]], step=1, seed=0)
    found = evaluate(objective, model, prepared, token_budget=10_000)
    assert found["cwe_loss"] == pytest.approx(math.log(60), rel=1e-5)
    assert found["cwe_top1"] == 0
    assert found["cwe_cosine"] == pytest.approx(1.0)


def test_a_fresh_model_knows_nothing_and_learns_one_batch() -> None:
    objective, model = make(ALL, TINY)
    prepared = objective.prepare([PAGES[0], PAGES[3], PAGES[5]], step=1, seed=0)
    before = evaluate(objective, model, prepared, token_budget=10_000)
    assert before["mllm_loss"] == pytest.approx(math.log(TINY.vocab_size), rel=0.1)
    assert before["swp_loss"] == pytest.approx(math.log(TINY.vocab_size), rel=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    [batch] = objective.micro_batches(prepared, token_budget=100_000)
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        objective.loss(model, batch, prepared.counts)[0].backward()
        optimizer.step()
    after = evaluate(objective, model, prepared, token_budget=10_000)
    for task in TASKS:
        assert after[f"{task}_loss"] < 0.6 * before[f"{task}_loss"], task
    assert after["mllm_accuracy"] > before["mllm_accuracy"] + 0.3
    assert after["cwe_top1"] > before["cwe_top1"]
    assert model.training


def test_the_checks_say_what_the_tasks_have_to_beat() -> None:
    objective, model = make(ALL)
    found = leak_checks(objective, model, PAGES, token_budget=500)
    prepared = objective.prepare(PAGES, step=0, seed=0)
    views = [view.swp for example in prepared.examples for view in example.views]
    labels = np.concatenate([swp.labels for swp in views])
    assert found["swp_majority"] == pytest.approx(np.bincount(labels).max() / len(labels))
    in_order = np.concatenate([swp.in_order for swp in views])
    assert found["swp_reading_order"] == pytest.approx((labels == in_order).mean())
    assert 0.1 < found["swp_reading_order"] < 0.6  # right one time in about four: it is the word to the right
    for name in ("swp_accuracy", "mllm_accuracy", "cwe_top1", "cwe_top1_hidden", "cwe_top1_shown", "cwe_top1_repeated"):
        assert {name, f"{name}_no_boxes"} <= found.keys()
    assert -1 <= found["cwe_cosine"] <= 1
    assert leak_checks(objective, model, PAGES, token_budget=500) == found


def test_without_boxes_the_model_is_blind_to_them() -> None:
    objective, model = make(NO_CWE)
    prepared = objective.prepare(PAGES[:1], step=0, seed=0)
    [batch] = objective.micro_batches(prepared, token_budget=10_000)
    elsewhere = replace(batch, inputs=replace(batch.inputs, boxes=batch.inputs.boxes // 2))

    def loss(batch: MicroBatch) -> float:
        return objective.loss(model, batch, prepared.counts)[0].item()

    assert loss(batch) != loss(elsewhere)
    assert loss(batch.without_boxes()) == loss(elsewhere.without_boxes()) != loss(batch)


def test_a_pretrained_model_is_read_as_an_encoder(tmp_path: Path) -> None:
    _, model = make(ALL)
    save_folder(tmp_path / "model", model, STILL, PIECES)
    encoder = load_utel(tmp_path / "model")
    assert all(torch.equal(weight, model.utel.state_dict()[name]) for name, weight in encoder.state_dict().items())


def test_pairs_have_metrics_of_their_own() -> None:
    objective, model = make(PAIRS)
    found = leak_checks(objective, model, PAGES)
    assert found["swp_majority"] == pytest.approx(0.75, abs=0.03)  # three negatives for each neighbour
    assert found["swp_loss"] == pytest.approx(math.log(5), rel=0.2)


@pytest.mark.parametrize("grad", [True, False])
def test_the_likelihood_is_made_in_chunks(grad: bool) -> None:
    """More logits than are made at a time: the same numbers and gradients."""
    torch.manual_seed(1)
    size, count = 30_000, 700
    states, words, bias = torch.randn(count, 8), torch.randn(size, 8), torch.randn(size)
    labels = torch.randint(0, size, (count,))
    tensors = [x.requires_grad_(grad) for x in (states, words, bias)]
    with torch.set_grad_enabled(grad):
        nll, likeliest = vocabulary_nll(states, words, bias, labels)
        logits = states @ words.T + bias
        expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(nll, expected, atol=1e-4)
    assert torch.equal(likeliest, logits.argmax(-1))
    if grad:
        for got, wanted in zip(
            torch.autograd.grad(nll.mean(), tensors), torch.autograd.grad(expected.mean(), tensors), strict=True
        ):
            assert torch.allclose(got, wanted, atol=1e-6)


def test_heads_are_there_for_the_tasks_of_the_config_alone() -> None:
    names = {name.partition(".")[0] for name, _ in make(NO_CWE)[1].named_parameters()}
    assert names == {"utel", "mllm", "swp"}
    assert not any("word_embeddings" in name and not name.startswith("utel") for name in make(ALL)[1].state_dict())
