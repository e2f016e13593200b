"""Which boxes stand side by side: the rows of a page."""

from __future__ import annotations

from collections.abc import Sequence

Edges = tuple[float, float, float, float]

SHARED_HEIGHT = 0.5
"""A box belongs to a row when they overlap vertically by at least this part of the lower one's height."""


def rows(boxes: Sequence[Edges]) -> list[list[int]]:
    """Indices of `boxes` (x0, y0, x1, y1) by row, rows from top to bottom and boxes from left to right.

    Boxes are taken by their middle height; the row's own height is the mean of its boxes', so that a slightly turned scan
    keeps its rows apart. Every index comes exactly once.
    """
    found: list[list[int]] = []
    top = bottom = 0.0
    for index in sorted(
        range(len(boxes)), key=lambda index: (boxes[index][1] + boxes[index][3], boxes[index][0], index)
    ):
        _, y0, _, y1 = boxes[index]
        if found and _share(top, bottom, y0, y1) >= SHARED_HEIGHT:
            found[-1].append(index)
            size = len(found[-1])
            top, bottom = top + (y0 - top) / size, bottom + (y1 - bottom) / size
        else:
            found.append([index])
            top, bottom = y0, y1
    for row in found:
        row.sort(key=lambda index: (boxes[index][0], index))
    return found


def _share(top: float, bottom: float, y0: float, y1: float) -> float:
    lower = min(bottom - top, y1 - y0)
    if lower <= 0:  # a flat box lies in the row or does not
        return float(max(top, y0) <= min(bottom, y1))
    return (min(bottom, y1) - max(top, y0)) / lower
