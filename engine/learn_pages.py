"""The learner of UTel: the same steps, ranks and optimizer as `engine.learn_torch`, on pages instead of rollouts.

An update's loss is that of all its pages, whatever their split: micro-batches add up, ranks are summed at the end, and the
denominators were counted over all ranks before. What a page is asked is a function of (seed, step, page), and dropout of
(seed, step, update, rank), so a step that is trained again comes to the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from engine.config import Config, ConfigError, UtelObjective, UtelTagObjective
from engine.documents.fields import FieldScore, compare, total
from engine.documents.page import Page
from engine.documents.page_rows import ReadPage, page_in, page_of, tags_in, tags_of_row, varied
from engine.gathered import Gathered
from engine.level_off import Pretraining as ValuePretraining
from engine.models import DTYPES
from engine.rows import Row
from engine.tasks import Source, page_tasks
from engine.totals import Totals
from engine.trained_model import Ranks
from engine.trained_torch import TorchModel
from engine.utel.decoding import best_fields
from engine.utel.encode import EncodedPage, cover, encode_page
from engine.utel.folder import fill, load_utel, read_weights
from engine.utel.pretraining.checks import leak_checks
from engine.utel.pretraining.heads import UtelPretraining
from engine.utel.pretraining.objective import Pretraining
from engine.utel.tagging import Tagging, UtelTagger, likeliest_tags, load_tagger, predict_logits
from engine.utel.wordpiece import load_wordpiece
from protocols.messages import Batch


class PageLearner:
    """Trains the UTel in `folder`. The same interface towards the trainer as `TorchLearner`."""

    critic = None

    def __init__(self, config: Config, folder: Path, *, device: str, ranks: Ranks) -> None:
        """Raises `ConfigError` for a folder that is not of this objective."""
        self.config, self.settings, self.ranks, self.device = config, config.learner, ranks, torch.device(device)
        self.pieces = load_wordpiece(folder)
        self.pretraining = ValuePretraining(None)
        self.objective: Pretraining | Tagging
        match config.objective:
            case UtelObjective() as objective:
                self.objective = Pretraining(objective, self.pieces)
                self.model: nn.Module = UtelPretraining(load_utel(folder), objective)
                fill(self.model, read_weights(folder), folder)
            case UtelTagObjective(length=length):
                tagger = load_tagger(folder)
                self.model, self.objective = tagger, Tagging(tagger.labels, self.pieces, length=length)
            case _:
                raise ConfigError(f'{config.source}: objective.type: expected "utel" or "utel-tag"')
        self.model.to(self.device, DTYPES[config.learner.dtype]).train()
        self.trained = TorchModel(
            "UTel",
            self.model,
            config.learner,
            ranks=ranks,
            bucket_bytes=config.learner.bucket_mb << 20,
            gradient_checkpointing=False,
        )

    def step(self, step: int, updates: list[Batch]) -> dict[str, float]:
        """Train step `step` (from 1) on this rank's share of each of its updates; its metrics, the same on every rank. Raises
        `NonFiniteError` before anything not finite reaches the weights."""
        totals = Totals({"pages": 1, **self.objective.sums}, self.device)
        rate = self.trained.rate(step)
        losses, norms = [], []
        for index, batch in enumerate(updates):
            totals.add({"pages": np.array([len(batch.sizes)])})
            self._seed(step, index)
            prepared = self._prepare(batch, step)
            totals.add(prepared.sums)
            denominators = self._over_ranks(prepared.counts)
            micro_batches = self.objective.micro_batches(
                prepared, token_budget=self.settings.token_budget, device=self.device
            )
            loss = self.trained.gradient(self._losses(micro_batches, denominators, totals), len(micro_batches))
            norm = self.trained.norm(loss, f"step {step}, update {index + 1} of {len(updates)}")
            self.trained.step(rate, norm)
            losses.append(loss)
            norms.append(norm)
        sums = totals.split(self.ranks.sum(totals.flat(), self.device))
        mean_loss, mean_norm = (sum(values) / max(1, len(values)) for values in (losses, norms))
        common = {"updates": float(len(losses)), "loss": mean_loss, "grad_norm": mean_norm, "lr": rate}
        return common | {"pages": float(sums["pages"][0])} | self.objective.metrics(sums)

    def evaluate(self) -> dict[str, float]:
        """Figures of `eval.prompts` held-out pages, by names that begin with "held_out_"; nothing when there are none."""
        rows, objective = self._held_out, self.config.objective
        if not rows or not isinstance(objective, UtelObjective | UtelTagObjective):
            return {}
        pages = [page_in(row) for row in rows]
        encoded = [self._encode(page) for page in pages]
        figures: dict[str, float] = {}
        for length in dict.fromkeys([objective.length, *objective.test_lengths]):
            found = self._figures(rows, pages, encoded, length)
            figures |= {length_name(name, length, objective.length): value for name, value in found.items()}
        return {f"held_out_{name}": value for name, value in figures.items()}

    def weights(self) -> Gathered:
        """The model's weights by name."""
        return self.trained.weights()

    def optimizer_state(self) -> Gathered:
        """The state of its optimizer, for a checkpoint."""
        return self.trained.optimizer_state()

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Continue from those of an equal model. Raises ValueError for tensors that do not fit."""
        self.trained.load(weights, optimizer)

    @cached_property
    def _held_out(self) -> list[Row]:
        """Read once, and only where evaluations are wanted."""
        count = self.config.eval.prompts
        return Source(page_tasks(self.config.tasks), self.config.seed).held_out(count) if count else []

    def _figures(
        self, rows: Sequence[Row], pages: Sequence[ReadPage], encoded: Sequence[EncodedPage], length: int
    ) -> dict[str, float]:
        """Of the held-out pages, read in rows of at most `length` sub-tokens."""
        budget, model = self.settings.token_budget, self.model
        if isinstance(self.config.objective, UtelObjective) and isinstance(model, UtelPretraining):
            asked = Pretraining(msgspec.structs.replace(self.config.objective, length=length), self.pieces)
            return leak_checks(asked, model, encoded, seed=self.config.seed, token_budget=budget)
        if not isinstance(model, UtelTagger):
            return {}
        logits = predict_logits(model, self.pieces, encoded, length=length, overlap=length // 4, token_budget=budget)
        tags = [likeliest_tags(own, model.labels) for own in logits]
        types = sorted({label[2:] for label in model.labels if label != "O"})
        values = [
            best_fields(Page(id=page.id, words=page.words, boxes=page.boxes), own, model.labels, types, model.habits)
            for page, own in zip(pages, logits, strict=True)
        ]
        return tag_figures(rows, tags, [{name: found.value for name, found in own.items()} for own in values])

    # --- one step --------------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch, step: int) -> Any:
        prompts = np.split(batch.prompts, np.cumsum(batch.prompt_lengths)[:-1]) if len(batch.prompt_lengths) else []
        pages = [self._seen(page_of(prompt), step) for prompt in prompts]
        if isinstance(self.objective, Pretraining):
            return self.objective.prepare(pages, step=step, seed=self.config.seed)
        responses = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1]) if len(batch.lengths) else []
        tags = [tags_in(response) for response in responses]
        tagged = [(page, own) for page, own in zip(pages, tags, strict=True) if own is not None]
        return self.objective.prepare([page for page, _ in tagged], [own for _, own in tagged])

    def _losses(
        self, micro_batches: Iterable[Any], denominators: Mapping[str, float], totals: Totals
    ) -> Iterator[Tensor]:
        objective: Any = self.objective  # two classes of one shape
        for micro_batch in micro_batches:
            loss, sums = objective.loss(self.model, micro_batch, denominators)
            yield loss
            totals.add(sums)

    def _over_ranks(self, counts: Mapping[str, float]) -> dict[str, float]:
        summed = self.ranks.sum(np.array(list(counts.values())), self.device)
        return {name: max(float(value), 1.0) for name, value in zip(counts, summed, strict=True)}

    def _seed(self, step: int, update: int) -> None:
        key = f"{self.config.seed} {step} {update} {self.ranks.rank}"
        torch.manual_seed(xxhash.xxh3_64_intdigest(key.encode()) >> 1)

    def _seen(self, page: ReadPage, step: int) -> EncodedPage:
        objective, key = self.config.objective, f"{self.config.seed} {step} {page.id}"
        if not isinstance(objective, UtelTagObjective):
            return self._encode(page)
        encoded = self._encode(varied(page, objective.vary, key) if objective.vary else page)
        if not objective.hide:
            return encoded
        drawn = np.random.default_rng(xxhash.xxh3_64_intdigest(key.encode())).random(len(encoded))
        return cover(encoded, drawn < objective.hide, self.pieces.mask)

    def _encode(self, page: ReadPage) -> EncodedPage:
        return encode_page(self.pieces, page.words, page.boxes, id=page.id)


def length_name(name: str, length: int, trained: int) -> str:
    """A figure's name: "f1" in rows of the length that was trained on, "at_1024_f1" in others."""
    return name if length == trained else f"at_{length}_{name}"


def tag_figures(
    rows: Sequence[Row], predicted: Sequence[list[str]], values: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Of held-out pages: entity F1 of the tags (seqeval's default and strict readings, and by type), and F1 of the fields'
    values, in their normal forms, against the pages' labels, of the pages that have any."""
    from engine.documents.entities import score_tags  # needs the extra `documents`

    gold = [tags_of_row(row) for row in rows]
    tagged = [place for place, tags in enumerate(gold) if tags is not None]
    scores = score_tags([gold[place] or [] for place in tagged], [predicted[place] for place in tagged])
    figures = {"f1": scores.default.micro.f1, "f1_strict": scores.strict.micro.f1}
    figures |= {f"f1_{name}": score.f1 for name, score in scores.default.types.items()}
    fields: dict[str, FieldScore] = {}
    for row, own in zip(rows, values, strict=True):
        labels: dict[str, str] = msgspec.json.decode(row.answer)
        for name, score in compare(own, labels).items() if labels else ():
            fields[name] = fields.get(name, FieldScore()) + score
    if fields:
        figures["fields_f1"] = total(fields.values()).f1
    return figures | {f"fields_f1_{name}": score.f1 for name, score in fields.items()}
