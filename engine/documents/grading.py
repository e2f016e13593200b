"""Grading a response of a document task: field F1 against the page's labels, and against a model's reading of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from engine.documents.fields import FieldScore, compare, extract_fields, field_name, has_object, total
from engine.documents.page import Box, Page
from engine.scores import RewardError, Score


class Reference(Struct, frozen=True):
    """What a row of a document task is graded by. `labels` are None where nobody labelled the page; `missed` counts labels
    whose text stands nowhere on the page."""

    id: str
    wanted: list[str]
    labels: dict[str, str] | None
    missed: int
    words: list[str]
    boxes: list[Box]

    @property
    def page(self) -> Page:
        return Page(id=self.id, words=self.words, boxes=self.boxes)


def reference(document: Mapping[str, Any]) -> Reference:
    """Of a row's answer document. Raises `RewardError`."""
    try:
        return msgspec.convert(document["document"], Reference)
    except (KeyError, msgspec.ValidationError) as error:
        raise RewardError(f"the row's answer: document: expected the page and its labels: {error!r}") from error


def grade_document(text: str, page: Reference, reading: Mapping[str, str] | None, threshold: float = 1.0) -> Score:
    """The score of the response `text`; `reading` is what a model reads on the page, None where no model was asked.

    Only fields that are wanted count. `parts`: `parsed` (0: there is no JSON object in the response, whose reward is 0),
    `labelled`, `label_f1` and `utel_f1` (the response against each), `reading_f1` (the reading against the labels: how far
    the two references agree), `labels_missed`. The reward is `label_f1` where the page has labels, else `utel_f1`. Raises
    `RewardError` where there is neither.
    """
    found = _wanted(extract_fields(text), page.wanted)
    parts = {"parsed": float(has_object(text)), "labelled": float(page.labels is not None)}
    scores: list[FieldScore] = []
    if page.labels is not None:
        scores.append(_f1(found, page.labels, parts, "label_f1"))
        parts["labels_missed"] = float(page.missed)
    if reading is not None:
        scores.append(_f1(found, reading, parts, "utel_f1"))
        if page.labels is not None:
            _f1(reading, page.labels, parts, "reading_f1")
    if not scores:
        raise RewardError(f"page {page.id!r}: has no labels, and score.utel names no tagger that could read it")
    reward = scores[0].f1 if parts["parsed"] else 0.0
    return Score(correct=bool(parts["parsed"]) and reward >= threshold, value=reward, parts=parts, reward=reward)


def _f1(found: Mapping[str, str], wanted: Mapping[str, str], parts: dict[str, float], name: str) -> FieldScore:
    score = total(compare(found, wanted).values())
    parts[name] = score.f1
    return score


def _wanted(found: Mapping[str, str], wanted: Sequence[str]) -> dict[str, str]:
    """The fields that were asked for: what else a response says neither helps nor hurts."""
    names = {field_name(name) for name in wanted}
    return {name: value for name, value in found.items() if field_name(name) in names}
