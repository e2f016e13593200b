"""UTel's joint pretraining: `prepare` says what a rank's pages are asked at a step, `loss` turns a micro-batch into a number.

Each task's loss is a sum over its own targets divided by a denominator that the caller counted over all pages of all ranks
(as in `engine.losses`), so micro-batches and ranks add up to one number, whatever the split. What is reported are sums, which
add up in the same way; `metrics` turns them into figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.utel.encode import EncodedPage, Inputs, stack, windows
from engine.utel.pretraining.config import DIRECTIONS, PretrainingConfig
from engine.utel.pretraining.contrast import contrast
from engine.utel.pretraining.heads import UtelPretraining
from engine.utel.pretraining.views import Example, make_example
from engine.utel.wordpiece import WordPiece

Sums = dict[str, np.ndarray]
"""Vectors (of one entry, unless it is a histogram) that add up over micro-batches, ranks and steps."""


@dataclass(frozen=True)
class Prepared:
    """A rank's share of one update. `counts` is what it adds to each task's denominator, `sums` to the step's totals."""

    examples: list[Example]
    counts: dict[str, float]
    sums: Sums


@dataclass(frozen=True)
class MicroBatch:
    """B rows, views of one example side by side. Targets name places in the flat [B * L] hidden states.

    `swp_asked` are directions, or such places of the pair's second words. `cwe_at` [2, K]: the sampled words in both views;
    `page` [K]: which example they are of.
    """

    inputs: Inputs
    mllm_at: Tensor
    mllm_labels: Tensor
    swp_at: Tensor
    swp_asked: Tensor
    swp_labels: Tensor
    cwe_at: Tensor
    page: Tensor
    hidden: Tensor
    repeated: Tensor

    def without_boxes(self) -> MicroBatch:
        """The same questions with all boxes put out of sight."""
        return replace(self, inputs=replace(self.inputs, boxes=torch.zeros_like(self.inputs.boxes)))


class Pretraining:
    """The objective. `sums` names all totals that `prepare` and `loss` report, with their lengths."""

    def __init__(self, config: PretrainingConfig, pieces: WordPiece) -> None:
        self.config, self.pieces = config, pieces
        self.answers = pieces.size if config.swp.reading == "vocabulary" else len(DIRECTIONS) + 1
        lengths: dict[str, int] = {"rows": 1, "positions": 1}
        if config.mllm.weight:
            lengths |= dict.fromkeys(("mllm", "mllm_nll", "mllm_right"), 1)
        if config.swp.weight:
            lengths |= dict.fromkeys(("swp", "swp_nll", "swp_right", "swp_in_order"), 1) | {"swp_labels": self.answers}
        if config.cwe.weight:
            kinds = ("cwe", "cwe_hidden", "cwe_shown", "cwe_repeated")
            lengths |= dict.fromkeys((*kinds, *(f"{kind}_right" for kind in kinds)), 1)
            lengths |= dict.fromkeys(("cwe_nll", "cwe_cosine", "cwe_pairs"), 1)
        self.sums = lengths

    def prepare(self, pages: Sequence[EncodedPage], *, step: int, seed: int) -> Prepared:
        """This rank's pages of an update; a function of (seed, step) and each page alone."""
        examples = [
            make_example(window, self.pieces, self.config, seed=seed, step=step)
            for page in pages
            for window in windows(page, self.config.length)
        ]
        views = [view for example in examples for view in example.views]
        counts = {
            "mllm": float(sum(len(view.mllm.at) for view in views)),
            "swp": float(sum(len(view.swp.at) for view in views)),
            "cwe": float(sum(len(example.cwe.at) for example in examples)),
        }
        sums: Sums = {
            "rows": np.array([float(len(views))]),
            "positions": np.array([float(sum(len(view.row.ids) for view in views))]),
        }
        if self.config.swp.weight:
            labels = np.concatenate([view.swp.labels for view in views] or [np.zeros(0, dtype=np.int64)])
            in_order = sum(float((view.swp.labels == view.swp.in_order).sum()) for view in views)
            sums |= {
                "swp_labels": np.bincount(labels, minlength=self.answers).astype(np.float64),
                "swp_in_order": np.array([in_order]),
            }
        return Prepared(examples, counts, sums)

    def micro_batches(
        self, prepared: Prepared, *, token_budget: int, device: torch.device | str = "cpu"
    ) -> list[MicroBatch]:
        """Batches of at most `token_budget` positions, padding counted, of examples of like length. Both views of an example
        stay together; one that is larger by itself gets a batch of its own. Deterministic."""
        batches: list[list[Example]] = []
        for example in sorted(prepared.examples, key=lambda example: -example.length):
            rows = len(example.views) * (len(batches[-1]) + 1) if batches else 0
            if not batches or rows * batches[-1][0].length > token_budget:
                batches.append([])
            batches[-1].append(example)
        return [self._lay_out(batch, device) for batch in batches]

    def loss(
        self, model: UtelPretraining, batch: MicroBatch, denominators: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the weighted sum of the tasks' losses, the sums of this batch). A task without targets here adds exactly 0."""
        inputs = batch.inputs
        hidden = model.utel(inputs.ids, inputs.boxes, inputs.mask).flatten(0, 1)
        terms: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for name, task in (("mllm", self._mllm), ("swp", self._swp), ("cwe", self._cwe)):
            weight, denominator = self.config.weights[name], denominators.get(name, 0)
            if not weight:
                continue
            found = task(model, batch, hidden)
            sums |= {key: value.detach().reshape(1) for key, value in found.items()}
            if denominator:
                terms.append(weight / denominator * found[f"{name}_nll"])
        return torch.stack(terms).sum() if terms else hidden[:0].sum(), sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Figures of a step. A task that had no target has none."""
        one = {name: float(values[0]) for name, values in sums.items() if len(values) == 1}
        found = {"positions_per_row": one["positions"] / max(one["rows"], 1.0)}
        for task in ("mllm", "swp"):
            if count := one.get(task):
                found |= {f"{task}_loss": one[f"{task}_nll"] / count, f"{task}_accuracy": one[f"{task}_right"] / count}
        if count := one.get("swp"):
            found |= {
                "swp_majority": float(sums["swp_labels"].max()) / count,
                "swp_reading_order": one["swp_in_order"] / count,
            }
        if count := one.get("cwe"):
            found |= {"cwe_loss": one["cwe_nll"] / count, "cwe_cosine": one["cwe_cosine"] / one["cwe_pairs"]}
            for kind in ("", "_hidden", "_shown", "_repeated"):
                if of := one[f"cwe{kind}"]:
                    found[f"cwe_top1{kind}"] = one[f"cwe{kind}_right"] / of
        return found

    # --- the tasks: sums over a micro-batch ------------------------------------------------------------------------

    def _mllm(self, model: UtelPretraining, batch: MicroBatch, hidden: Tensor) -> dict[str, Tensor]:
        at, labels = batch.mllm_at, batch.mllm_labels
        if not len(at):
            return _zeros("mllm", hidden)
        nll, likeliest = model.mllm(hidden[at], model.words, labels)
        return _told("mllm", nll, likeliest, labels)

    def _swp(self, model: UtelPretraining, batch: MicroBatch, hidden: Tensor) -> dict[str, Tensor]:
        at, asked, labels = batch.swp_at, batch.swp_asked, batch.swp_labels
        if not len(at):
            return _zeros("swp", hidden)
        if self.config.swp.reading == "pair":
            nll, likeliest = model.swp(hidden[at], hidden[asked], labels)
        else:
            nll, likeliest = model.swp(hidden[at], asked, model.words, labels)
        return _told("swp", nll, likeliest, labels)

    def _cwe(self, model: UtelPretraining, batch: MicroBatch, hidden: Tensor) -> dict[str, Tensor]:
        kinds = {"cwe": torch.ones_like(batch.hidden), "cwe_hidden": batch.hidden, "cwe_shown": ~batch.hidden,
                 "cwe_repeated": batch.repeated}  # fmt: skip
        sums = {kind: members.sum().float() for kind, members in kinds.items()}
        if not len(batch.page):
            nothing = _zeros("cwe", hidden)["cwe_nll"]
            return {name: sums.get(name, nothing) for name in self.sums if name.startswith("cwe")}
        first, second = model.cwe(hidden[batch.cwe_at.flatten()]).view(2, len(batch.page), -1)
        found = contrast(first, second, batch.page, temperature=self.config.cwe.temperature)
        sums |= {f"{kind}_right": found.matched[members].sum() for kind, members in kinds.items()}
        return {**sums, "cwe_nll": found.loss.sum(), "cwe_cosine": found.cosine, "cwe_pairs": found.pairs.float()}

    def _lay_out(self, examples: list[Example], device: torch.device | str) -> MicroBatch:
        views = [(view, example) for example in examples for view in example.views]
        length = max(example.length for example in examples)
        pair = self.config.swp.reading == "pair"
        mllm_at, swp_at, asked = [], [], []
        for row, (view, _) in enumerate(views):
            mllm_at.append(view.mllm.at + row * length)
            swp_at.append(view.swp.at + row * length)
            asked.append(view.swp.asked + row * length * pair)
        cwe_at: list[list[np.ndarray]] = [[], []]
        if self.config.views == 2:
            for index, example in enumerate(examples):
                for view_index, places in enumerate(cwe_at):
                    places.append(example.cwe.at + (2 * index + view_index) * length)
        sampled = [len(example.cwe.at) for example in examples]

        def move(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)).to(device)

        return MicroBatch(
            inputs=stack([view.row for view, _ in views], self.pieces, device),
            mllm_at=move(mllm_at),
            mllm_labels=move([view.mllm.labels for view, _ in views]),
            swp_at=move(swp_at),
            swp_asked=move(asked),
            swp_labels=move([view.swp.labels for view, _ in views]),
            cwe_at=torch.stack([move(places) for places in cwe_at]),
            page=move([np.repeat(np.arange(len(examples)), sampled)]),
            hidden=move([example.cwe.hidden for example in examples]),
            repeated=move([example.cwe.repeated for example in examples]),
        )


def _told(task: str, nll: Tensor, likeliest: Tensor, labels: Tensor) -> dict[str, Tensor]:
    right = (likeliest == labels).sum()
    return {f"{task}_nll": nll.sum(), task: right.new_tensor(len(labels)).float(), f"{task}_right": right.float()}


def _zeros(task: str, hidden: Tensor) -> dict[str, Tensor]:
    """Zeros that are part of the graph, and that stay zeros whatever the hidden states are."""
    nothing = hidden[:0].float().sum()
    return {f"{task}_nll": nothing, task: nothing, f"{task}_right": nothing}
