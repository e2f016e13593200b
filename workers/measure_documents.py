"""How held-out responses to documents were graded, by labels and by UTel's reading, from the parts of their grades."""

from __future__ import annotations

from msgspec import Struct

from protocols.log import LogReader


class DocumentFigures(Struct, frozen=True):
    """Of the evaluation after `step` steps: means over graded samples. `label_f1` is over those with labels, `utel_f1` over
    those that UTel read, and `reading_f1` (UTel against the labels) and `divergence` (mean distance of the two F1) over
    those with both; None where there are none. `labels_missed` counts labels that stand nowhere on their page, once a page."""

    step: int
    parsed: float
    label_f1: float | None
    utel_f1: float | None
    reading_f1: float | None
    divergence: float | None
    labels_missed: int


_FIGURES = """SELECT step, avg(parsed), avg(label), avg(utel), avg(reading), avg(abs(label - utel)) FROM (
    SELECT g.min_version AS step, json_extract(s.parts, '$.parsed') AS parsed,
        json_extract(s.parts, '$.label_f1') AS label, json_extract(s.parts, '$.utel_f1') AS utel,
        json_extract(s.parts, '$.reading_f1') AS reading
    FROM groups AS g JOIN samples AS s ON s.group_id = g.id
    WHERE g.kind = 'eval' AND g.status = 'evaluated' AND s.verdict = 'graded'
        AND json_extract(s.parts, '$.labelled') IS NOT NULL) GROUP BY step ORDER BY step"""
_MISSED = """SELECT step, sum(missed) FROM (
    SELECT g.min_version AS step, max(json_extract(s.parts, '$.labels_missed')) AS missed
    FROM groups AS g JOIN samples AS s ON s.group_id = g.id
    WHERE g.kind = 'eval' AND s.verdict = 'graded' GROUP BY g.id) GROUP BY step"""


def document_figures(log: LogReader) -> list[DocumentFigures]:
    """Of every evaluation with responses to documents, in order."""
    found = log.query(_FIGURES)
    missed = dict(log.query(_MISSED)) if found else {}
    return [
        DocumentFigures(step, parsed, label, utel, reading, divergence, int(missed.get(step) or 0))
        for step, parsed, label, utel, reading, divergence in found
    ]


def document_line(figures: DocumentFigures) -> str:
    """`field F1 0.61 by labels, 0.55 by UTel's reading, ...`"""
    parts = []
    if figures.label_f1 is not None:
        parts.append(f"field F1 {figures.label_f1:.3f} by labels")
    if figures.utel_f1 is not None:
        parts.append(f"field F1 {figures.utel_f1:.3f} by UTel's reading")
    if figures.divergence is not None:
        parts.append(f"which differ by {figures.divergence:.3f} a response; UTel by labels {figures.reading_f1:.3f}")
    parts.append(f"{figures.parsed:.1%} hold JSON")
    if figures.labels_missed:
        parts.append(f"{figures.labels_missed} labels stand nowhere on their page")
    return "; ".join(parts)
