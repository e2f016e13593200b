"""From a tagger's figures to entities: the likeliest sequence of labels that can be, and the best span of each field."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.documents.page import Box, Page
from engine.documents.tags import Span, spans
from engine.documents.values import normal, value_in
from engine.utel.tagging import to_tags

LONGEST = 64
"""Words of a field's span at most; the longest address of SROIE's receipts has 21."""
READINGS = 40
"""Spans of a field that are weighed against each other, the likeliest ones."""
LEAST = 0.05
"""A field whose span is less likely than this is not found."""
EDGES = {"company": (5.5, 1.1), "address": (6.1, 5.0), "total": (1.5, 4.8)}
"""What it costs a field's span to begin, and to end, inside a line of text, in nats: the log-odds of the labels of SROIE's
receipts to begin (company 99.6 %, address 99.8 %, total 82 %) and end (75 %, 99.4 %, 99.2 %) where a line does. Dates do so by
chance."""


class Entity(NamedTuple):
    """Words start..stop-1. `confidence` is the geometric mean of its words' label probabilities."""

    type: str
    start: int
    stop: int
    confidence: float


class Field(NamedTuple):
    """A field's value and the likeliest span that says it. `confidence` is as an `Entity`'s."""

    value: str
    span: Span
    confidence: float


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """[..., labels]"""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def likeliest(logits: np.ndarray, labels: Sequence[str]) -> list[int]:
    """The labels' numbers [words] of the likeliest sequence in which every entity begins and ends as its scheme says
    (Viterbi)."""
    if not len(logits):
        return []
    allowed, first, last = _grammar(labels)
    scores = log_probabilities(logits)
    barred = np.where(allowed, 0.0, -np.inf)
    best = scores[0] + np.where(first, 0.0, -np.inf)
    came: list[np.ndarray] = []
    for row in scores[1:]:
        paths = best[:, None] + barred
        came.append(paths.argmax(axis=0))
        best = paths.max(axis=0) + row
    path = [int((best + np.where(last, 0.0, -np.inf)).argmax())]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    return path[::-1]


def entities(logits: np.ndarray, labels: Sequence[str]) -> list[Entity]:
    """The entities of the likeliest sequence, in the words' order."""
    path = likeliest(logits, labels)
    scores = log_probabilities(logits)
    return [
        Entity(type_, start, stop, float(np.exp(np.mean([scores[word, path[word]] for word in range(start, stop)]))))
        for type_, start, stop in spans(to_tags(path, labels))
    ]


def _grammar(labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which label may follow which [before, after], which may be first, and which last."""
    bies = any(label.startswith("S-") for label in labels)
    opens = np.array([label == "O" or label[0] in "BS" for label in labels])
    closes = np.array([label == "O" or label[0] in ("ES" if bies else "BI") for label in labels])
    inner = np.array(
        [[before[0] in "BI" and after[0] in "IE" and before[1:] == after[1:] for after in labels] for before in labels]
    )
    return (closes[:, None] & opens[None, :]) | inner, opens, closes


# --- one value a field ---------------------------------------------------------------------------------------------


def best_fields(page: Page, logits: np.ndarray, labels: Sequence[str], types: Sequence[str]) -> dict[str, Field]:
    """The value of each of `types` that the page holds with a confidence of at least `LEAST`; `logits` [words, labels]. Types
    that the labels lack are not found."""
    scores, edges = log_probabilities(logits), line_edges(page.boxes)
    found = {}
    for type_ in types:
        if f"B-{type_}" in labels and page.words:
            field = _best_field(page.words, edges, scores, labels, type_)
            if field is not None and field.confidence >= LEAST:
                found[type_] = field
    return found


def line_edges(boxes: Sequence[Box]) -> np.ndarray:
    """bool [words + 1]: whether a line of text begins with the word, or ends before it. Words go on with a line when they are
    exactly as high and further right."""
    inner = [
        (left[1], left[3]) == (right[1], right[3]) and left[0] <= right[0] for left, right in itertools.pairwise(boxes)
    ]
    return ~np.array([False, *inner, False])


def _best_field(
    words: Sequence[str], edges: np.ndarray, scores: np.ndarray, labels: Sequence[str], type_: str
) -> Field | None:
    """Spans are weighed by their odds: the probability of their labels over that of "O" at the same words, and what it costs
    to break a line. The odds of spans that say the same value (a total stands at several places) add up, and the value with
    the highest sum wins."""
    starts, lengths, inside, outside = _spans(scores, labels, type_)
    begin, end = EDGES.get(type_, (0.0, 0.0))
    odds = inside - outside - begin * ~edges[starts] - end * ~edges[starts + lengths]
    weights: dict[str, float] = {}
    first: dict[str, tuple[int, str]] = {}
    order = np.argsort(-odds, kind="stable")[:READINGS]
    for place in order:
        text = value_in(type_, " ".join(words[starts[place] : starts[place] + lengths[place]]))
        if not (form := normal(type_, text)):
            continue
        weights[form] = weights.get(form, 0.0) + float(np.exp(odds[place] - odds[order[0]]))
        first.setdefault(form, (int(place), text))
    if not weights:
        return None
    place, text = first[max(weights, key=lambda form: weights[form])]
    span = Span(type_, int(starts[place]), int(starts[place] + lengths[place]))
    return Field(text, span, float(np.exp(inside[place] / lengths[place])))


def _spans(
    scores: np.ndarray, labels: Sequence[str], type_: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every span of at most `LONGEST` words: first word, length, log-probability of its labels, and of as many "O"."""
    number = {label: index for index, label in enumerate(labels)}
    begin, inner = scores[:, number[f"B-{type_}"]], scores[:, number[f"I-{type_}"]]
    end = scores[:, number[f"E-{type_}"]] if f"E-{type_}" in number else inner
    single = scores[:, number[f"S-{type_}"]] if f"S-{type_}" in number else begin
    inners, outers = (np.concatenate([[0.0], np.cumsum(column)]) for column in (inner, scores[:, number["O"]]))
    found = []
    for length in range(1, min(LONGEST, len(scores)) + 1):
        start = np.arange(len(scores) - length + 1)
        stop = start + length
        inside = single if length == 1 else begin[start] + inners[stop - 1] - inners[start + 1] + end[stop - 1]
        found.append((start, np.full_like(start, length), inside, outers[stop] - outers[start]))
    starts, lengths, insides, outsides = (np.concatenate(column) for column in zip(*found, strict=True))
    return starts, lengths, insides, outsides
