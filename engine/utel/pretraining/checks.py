"""Whether a pretraining task teaches what it is meant to: the same questions, answered without layout and by rules of thumb."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.utel.encode import EncodedPage
from engine.utel.pretraining.heads import UtelPretraining
from engine.utel.pretraining.objective import MicroBatch, Prepared, Pretraining, Sums


@torch.no_grad()
def evaluate(
    objective: Pretraining, model: UtelPretraining, prepared: Prepared, *, token_budget: int, boxes: bool = True
) -> dict[str, float]:
    """The metrics of these pages without dropout; `boxes` False puts all boxes out of sight."""
    training = model.training
    model.eval()
    device = model.words.device
    sums: Sums = {name: np.zeros(length) for name, length in objective.sums.items()}
    for name, values in prepared.sums.items():
        sums[name] += values
    batches: Sequence[MicroBatch] = objective.micro_batches(prepared, token_budget=token_budget, device=device)
    for batch in batches:
        _, found = objective.loss(model, batch if boxes else batch.without_boxes(), prepared.counts)
        for name, value in found.items():
            sums[name] += value.double().cpu().numpy()
    model.train(training)
    return objective.metrics(sums)


def leak_checks(
    objective: Pretraining,
    model: UtelPretraining,
    pages: Sequence[EncodedPage],
    *,
    seed: int = 0,
    token_budget: int = 8192,
) -> dict[str, float]:
    """The metrics of held-out pages, and what they have to be held against.

    `swp_majority` is the accuracy of always answering the most frequent label, `swp_reading_order` that of the next word
    in reading order, and `swp_accuracy_no_boxes` (as all figures with that ending) that of the model when it sees no layout:
    a task whose accuracy is no better than these has taught no layout. For the contrastive task see `cwe_top1_hidden` (the
    blocks that neither text nor box alone can match), `cwe_top1_repeated` (the same text elsewhere on the page) and
    `cwe_cosine` between different blocks, which goes to 1 when all vectors collapse into one.
    """
    prepared = objective.prepare(pages, step=0, seed=seed)
    seen = evaluate(objective, model, prepared, token_budget=token_budget)
    unseen = evaluate(objective, model, prepared, token_budget=token_budget, boxes=False)
    answered = {name: value for name, value in unseen.items() if name.endswith("accuracy") or "top1" in name}
    return seen | {f"{name}_no_boxes": value for name, value in answered.items()}
