"""Which word is next to which on a page, by the boxes alone."""

from __future__ import annotations

import numpy as np

from engine.utel.config import SIZE
from engine.utel.pretraining.config import DIRECTIONS

NONE = -1
_FAR = np.iinfo(np.int32).max
_PAIRS = 1 << 22
"""Pairs that are looked at together: 16 MiB an array."""


def neighbours(boxes: np.ndarray, anchors: np.ndarray, *, cutoff: int = 250) -> np.ndarray:
    """The nearest words left, right, above and below of each anchor: `boxes` [N, 4], indices `anchors` [K] -> [K, 4] indices,
    `NONE` where there is nothing within `cutoff` thousandths of the page.

    A word stands to the right when its centre is further right and the two overlap vertically by at least half of the lower
    one's height; above or below when its centre is and they overlap horizontally at all. The least gap wins (overlapping
    words have none), then the least offset of the centres across the direction, then reading order.
    """
    found = np.full((len(anchors), len(DIRECTIONS)), NONE, dtype=np.int64)
    rows = max(1, _PAIRS // max(1, len(boxes)))
    edges = boxes.astype(np.int32)
    for first in range(0, len(anchors), rows):
        some = anchors[first : first + rows]
        for axis in (0, 1):
            found[first : first + rows, 2 * axis : 2 * axis + 2] = _along(edges, some, axis, cutoff)
    return found


def _along(boxes: np.ndarray, anchors: np.ndarray, axis: int, cutoff: int) -> np.ndarray:
    """[K, 2]: the nearest before and behind on the axis (0: left and right, 1: above and below)."""
    start, stop, low, high = (boxes[:, edge] for edge in (axis, axis + 2, 1 - axis, 3 - axis))

    def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return values[anchors][:, None], values[None]

    (a_start, b_start), (a_stop, b_stop), (a_low, b_low), (a_high, b_high) = map(pairs, (start, stop, low, high))
    overlap = np.minimum(a_high, b_high) - np.maximum(a_low, b_low)
    beside = 2 * overlap >= np.minimum(a_high - a_low, b_high - b_low) if axis == 0 else overlap > 0
    gap = np.maximum(np.maximum(a_start, b_start) - np.minimum(a_stop, b_stop), 0)
    offset = np.abs(a_low + a_high - b_low - b_high)  # of the centres, doubled: at most 2 * SIZE
    ahead = b_start + b_stop - a_start - a_stop
    cost = gap * (2 * SIZE + 1) + offset
    columns = []
    for side in (ahead < 0, ahead > 0):
        costs = np.where(beside & side & (gap <= cutoff), cost, _FAR)
        nearest = costs.argmin(axis=1) if costs.shape[1] else np.zeros(len(anchors), dtype=np.int64)
        reached = costs[np.arange(len(anchors)), nearest] < _FAR
        columns.append(np.where(reached, nearest, NONE))
    return np.stack(columns, axis=1)


def nearest(boxes: np.ndarray, anchor: int, among: np.ndarray, count: int) -> np.ndarray:
    """The `count` of the words `among` whose centres are nearest to the anchor's, in that order; ties in reading order."""
    centres = boxes[:, :2] + boxes[:, 2:]
    distance = ((centres[among] - centres[anchor]) ** 2).sum(axis=1)
    return among[np.argsort(distance, kind="stable")[:count]]
