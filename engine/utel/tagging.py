"""Entity tags for words: one linear layer on the hidden state of each word's first sub-token, and back from labels to tags.

`prepare`, `loss` and `metrics` have the shapes of `engine.utel.pretraining.objective`. Outside, tags are BIO; a model may be
trained on BIES ("E" ends an entity, "S" is one by itself), as UTel's released code does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.config_section import ConfigError
from engine.documents.tags import spans, tags_of
from engine.utel.encode import EncodedPage, Inputs, Window, lay_out, stack, windows
from engine.utel.folder import CONFIG, fill, read_config, read_weights, save_folder, utel_config
from engine.utel.habits import Habits
from engine.utel.model import Utel
from engine.utel.wordpiece import WordPiece

Scheme = Literal["BIO", "BIES"]


class UtelTagger(nn.Module):
    """`labels` are "O" and prefixed types, in the order of the classifier's outputs; `habits` are those of the types' labels
    on the training pages."""

    def __init__(self, utel: Utel, labels: Sequence[str], habits: Mapping[str, Habits] | None = None) -> None:
        super().__init__()
        self.utel, self.labels, self.habits = utel, tuple(labels), dict(habits or {})
        self.classifier = nn.Linear(utel.config.hidden_size, len(self.labels))
        nn.init.normal_(self.classifier.weight, std=utel.config.initializer_range)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, inputs: Inputs, at: Tensor) -> Tensor:
        """Logits [T, labels] in fp32 at the places `at` [T] of the flat [B * L] positions."""
        hidden = self.utel(inputs.ids, inputs.boxes, inputs.mask).flatten(0, 1)
        return self.classifier(hidden[at]).float()


def make_labels(types: Sequence[str], scheme: Scheme = "BIES") -> list[str]:
    """All labels of these entity types: 4 a type and "O", or 2 a type and "O" in BIO."""
    prefixes = "BIES" if scheme == "BIES" else "BI"
    return ["O", *(f"{prefix}-{type_}" for type_ in types for prefix in prefixes)]


def to_labels(tags: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The labels' numbers [words] of BIO tags, in the scheme that the labels have. Raises ValueError for a type that they
    lack."""
    named = ["O"] * len(tags)
    bies = any(label.startswith("S-") for label in labels)
    for type_, start, stop in spans(tags):
        named[start:stop] = [f"B-{type_}", *[f"I-{type_}"] * (stop - start - 1)]
        if bies:
            named[stop - 1] = f"{'S' if stop - start == 1 else 'E'}-{type_}"
    number = {label: index for index, label in enumerate(labels)}
    if unknown := sorted({label for label in named if label not in number}):
        raise ValueError(f"tags: got {unknown[0]!r}, expected one of {', '.join(labels)}")
    return np.array([number[label] for label in named], dtype=np.int64)


def to_tags(numbers: Sequence[int], labels: Sequence[str]) -> list[str]:
    """BIO tags of predicted labels, whatever their order: an entity that no "B" or "S" began begins where it is first seen.
    Its spans are the entities (`engine.documents.tags.spans`)."""
    prefix = {"E": "I", "S": "B"}
    named = [labels[number] for number in numbers]
    tags = [tag if tag == "O" else prefix.get(tag[0], tag[0]) + tag[1:] for tag in named]
    return tags_of(spans(tags), len(tags))


@dataclass(frozen=True)
class TagBatch:
    """`at` [T]: the places of words' first sub-tokens in the flat positions; `labels` [T]."""

    inputs: Inputs
    at: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PreparedTags:
    """A rank's share of one update: windows and their words' labels."""

    windows: list[tuple[Window, np.ndarray]]
    counts: dict[str, float]
    sums: dict[str, np.ndarray] = field(default_factory=dict)


class Tagging:
    """Cross-entropy over words, divided by a denominator that the caller counted over all ranks' pages."""

    def __init__(self, labels: Sequence[str], pieces: WordPiece, *, length: int = 512) -> None:
        self.labels, self.pieces, self.length = tuple(labels), pieces, length
        self.sums = dict.fromkeys(("tag_words", "tag_nll", "tag_right"), 1)

    def prepare(self, pages: Sequence[EncodedPage], tags: Sequence[Sequence[str]]) -> PreparedTags:
        """`tags` are BIO, one a word. Raises ValueError for another number and for types without a label."""
        found = []
        for page, own in zip(pages, tags, strict=True):
            if len(own) != len(page):
                raise ValueError(
                    f"page {page.id!r}: got {len(own)} tags, expected one for each of the {len(page)} words"
                )
            numbers = to_labels(own, self.labels)
            found += [(window, numbers[window.first : window.stop]) for window in windows(page, self.length)]
        return PreparedTags(found, {"tag": float(sum(len(numbers) for _, numbers in found))})

    def micro_batches(
        self, prepared: PreparedTags, *, token_budget: int, device: torch.device | str = "cpu"
    ) -> list[TagBatch]:
        """Of windows of like length, at most `token_budget` positions each, padding counted (but at least one window)."""
        batches = []
        for some in _split([window for window, _ in prepared.windows], token_budget):
            numbers = np.concatenate([prepared.windows[index][1] for index in some])
            inputs, at = _lay_out([prepared.windows[index][0] for index in some], self.pieces, device)
            batches.append(TagBatch(inputs, at, torch.from_numpy(numbers).to(device)))
        return batches

    def loss(
        self, model: UtelTagger, batch: TagBatch, denominators: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch.inputs, batch.at)
        nll = functional.cross_entropy(logits, batch.labels, reduction="sum")
        right = (logits.argmax(dim=-1) == batch.labels).sum()
        sums = {"tag_words": nll.new_tensor(float(len(batch.labels))), "tag_nll": nll, "tag_right": right.float()}
        return nll / denominators["tag"], {name: value.detach().reshape(1) for name, value in sums.items()}

    def metrics(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        words = max(float(sums["tag_words"][0]), 1.0)
        return {"tag_loss": float(sums["tag_nll"][0]) / words, "tag_accuracy": float(sums["tag_right"][0]) / words}


def likeliest_tags(logits: np.ndarray, labels: Sequence[str]) -> list[str]:
    """BIO tags of a page: each word's likeliest label, `logits` [words, labels]."""
    return to_tags(logits.argmax(axis=-1).tolist(), labels)


@torch.no_grad()
def predict_logits(
    model: UtelTagger,
    pieces: WordPiece,
    pages: Sequence[EncodedPage],
    *,
    length: int = 512,
    overlap: int = 128,
    token_budget: int = 8192,
) -> list[np.ndarray]:
    """fp32 [words, labels] of each page. A word that is in several windows is read in the one whose edges are furthest away
    from it (the page's own edges do not count)."""
    training, device = model.training, model.classifier.weight.device
    model.eval()
    shared = min(overlap, max(0, length - 3))
    found = [(index, window) for index, page in enumerate(pages) for window in windows(page, length, overlap=shared)]
    logits = [np.zeros((len(page), len(model.labels)), dtype=np.float32) for page in pages]
    margins = [np.full(len(page), -1) for page in pages]
    for some in _split([window for _, window in found], token_budget):
        inputs, at = _lay_out([found[place][1] for place in some], pieces, device)
        predicted = model(inputs, at).cpu().numpy()
        first = 0
        for place in some:
            index, window = found[place]
            own, first = predicted[first : first + len(window)], first + len(window)
            margin = _margin(window)
            better = margin > margins[index][window.first : window.stop]
            logits[index][window.first : window.stop][better] = own[better]
            margins[index][window.first : window.stop][better] = margin[better]
    model.train(training)
    return logits


def _margin(window: Window) -> np.ndarray:
    """Words between each word and the nearest edge of the window that is not the page's."""
    words, whole = np.arange(window.first, window.stop), len(window.page)
    before = words - window.first if window.first else np.full(len(words), whole)
    behind = window.stop - 1 - words if window.stop < whole else np.full(len(words), whole)
    return np.minimum(before, behind)


def _split(found: Sequence[Window], token_budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in sorted(range(len(found)), key=lambda index: -found[index].length):
        if not batches or (len(batches[-1]) + 1) * found[batches[-1][0]].length > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def _lay_out(some: Sequence[Window], pieces: WordPiece, device: torch.device | str) -> tuple[Inputs, Tensor]:
    inputs = stack([lay_out(window, pieces) for window in some], pieces, device)
    length = inputs.ids.shape[1]
    at = np.concatenate([window.starts[:-1] + row * length for row, window in enumerate(some)])
    return inputs, torch.from_numpy(at).to(device)


def save_tagger(folder: str | Path, model: UtelTagger, pieces: WordPiece) -> None:
    """A folder as `engine.utel.folder` writes, with the labels and their habits in its config.json."""
    by_number = {str(number): label for number, label in enumerate(model.labels)}
    by_label = {label: number for number, label in enumerate(model.labels)}
    extra = {"id2label": by_number, "label2id": by_label, "habits": msgspec.to_builtins(model.habits)}
    save_folder(folder, model, model.utel.config, pieces, extra=extra)


def load_tagger(folder: str | Path) -> UtelTagger:
    """In eval mode. Raises `ConfigError` for a folder without labels, and as `engine.utel.folder.load_utel` does."""
    folder = Path(folder)
    document = read_config(folder)
    config = utel_config(document, folder)
    named = document.get("id2label")
    if not isinstance(named, dict) or sorted(named) != sorted(map(str, range(len(named)))):
        raise ConfigError(f"{folder / CONFIG}: id2label: got {named!r}, expected a label for each of 0, 1, ...")
    try:
        habits = msgspec.convert(document.get("habits", {}), dict[str, Habits])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder / CONFIG}: habits: {error}") from error
    model = UtelTagger(Utel(config), [named[str(number)] for number in range(len(named))], habits)
    fill(model, read_weights(folder), folder)
    return model.eval()
