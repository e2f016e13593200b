"""From a tagger's figures to entities: the likeliest sequence of labels that can be, and the best span of each field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engine.documents.page import Page
from engine.documents.tags import Span, spans
from engine.documents.values import Kind, kind_of, normal, reads_as, value_in
from engine.utel.habits import Habits, line_edges
from engine.utel.tagging import to_tags

LONGEST = 64
"""Words of a field's span at most; the longest address of SROIE's receipts has 21."""
READINGS = 200
"""Spans of a field that are weighed against each other, the likeliest ones."""
LEAST: dict[Kind, float] = {"text": 0.02, "amount": 0.001, "date": 0.0002}
"""A field whose span is less confident than this is not found. Few texts of a page read as a date or an amount, so less says
enough for these."""
TEMPERATURE = 2.0
"""Divides a span's log-odds: a tagger that has learnt its pages by heart is too sure of each word."""


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


def best_fields(
    page: Page, logits: np.ndarray, labels: Sequence[str], types: Sequence[str], habits: Mapping[str, Habits]
) -> dict[str, Field]:
    """The value of each of `types` that the page holds with a confidence of at least `LEAST`; `logits` [words, labels]. Types
    that the labels lack are not found. No word belongs to two fields: the surest field takes its words first."""
    scores, edges = log_probabilities(logits), line_edges(page.boxes)
    left = {
        type_: _readings(page.words, edges, scores, labels, type_, habits.get(type_, Habits()))
        for type_ in types
        if f"B-{type_}" in labels and page.words
    }
    found: dict[str, Field] = {}
    while left:
        best = {type_: _weighed(readings) for type_, readings in left.items()}
        surest = max(best, key=lambda type_: best[type_][0])
        field = best[surest][1]
        del left[surest]
        if field is not None and field.confidence >= LEAST[kind_of(surest)]:
            found[surest] = field
            left = {
                type_: [one for one in readings if _apart(one.field.span, field.span)]
                for type_, readings in left.items()
            }
    return {type_: found[type_] for type_ in types if type_ in found}


class _Reading(NamedTuple):
    """A span as a field; `form` is the value's normal form, `odds` the logarithm of how likely it is."""

    form: str
    odds: float
    field: Field


def _readings(
    words: Sequence[str], edges: np.ndarray, scores: np.ndarray, labels: Sequence[str], type_: str, habits: Habits
) -> list[_Reading]:
    """The likeliest `READINGS` spans, but those that do not read as what the field is. A span's odds are the probability of its
    labels over that of "O" at the same words, and what it costs to differ from the field's habits."""
    starts, lengths, inside, outside = _spans(scores, labels, type_)
    odds = (inside - outside) / TEMPERATURE - habits.cost(edges[starts], edges[starts + lengths])
    found = []
    for place in np.argsort(-odds, kind="stable")[:READINGS]:
        start, length = int(starts[place]), int(lengths[place])
        text = value_in(type_, " ".join(words[start : start + length]))
        if reads_as(type_, text) and (form := normal(type_, text)):
            cost = habits.amount_cost(text, form) if kind_of(type_) == "amount" else 0.0
            confidence = float(np.exp(inside[place] / length))
            found.append(
                _Reading(form, float(odds[place]) - cost, Field(text, Span(type_, start, start + length), confidence))
            )
    return found


def _weighed(readings: Sequence[_Reading]) -> tuple[float, Field | None]:
    """The odds of spans that say the same value (a total stands at several places) add up, and the value with the highest sum
    wins: its log-odds, and the first of its spans."""
    weights: dict[str, float] = {}
    first: dict[str, Field] = {}
    for form, odds, field in readings:
        weights[form] = float(np.logaddexp(weights.get(form, -np.inf), odds))
        first.setdefault(form, field)
    if not weights:
        return -np.inf, None
    best = max(weights, key=lambda form: weights[form])
    return weights[best], first[best]


def _apart(one: Span, other: Span) -> bool:
    return one.stop <= other.start or other.stop <= one.start


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
