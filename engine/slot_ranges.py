"""Which slots attend together. Attention over a range of slots reads as many tokens of each as its longest holds, so
lengths that differ much, which sampling gives, want several ranges; each range costs some launches."""

from __future__ import annotations

import numpy as np


def ranges(lengths: np.ndarray, *, range_cost: int) -> list[int]:
    """Ends of consecutive ranges of slots, the last one `len(lengths)`, that keep what is read small.

    Splits where it saves most, as long as a split saves more than `range_cost` tokens.
    """
    ends: list[int] = []
    todo = [(0, len(lengths))]
    while todo:
        start, end = todo.pop()
        cut = _best_cut(lengths[start:end], range_cost)
        if cut:
            todo += [(start + cut, end), (start, start + cut)]
        else:
            ends.append(end)
    return ends


def tokens_read(lengths: np.ndarray, ends: list[int], *, range_cost: int) -> int:
    """What one step reads with these ranges, in tokens, each range's cost included."""
    starts = np.array([0, *ends[:-1]])
    return int(np.dot(np.maximum.reduceat(lengths, starts), np.diff([0, *ends]))) + range_cost * len(ends)


def reorder(lengths: np.ndarray, *, range_cost: int, horizon: int) -> np.ndarray | None:
    """The order of slots, longest first, if moving there is worth it for the next `horizon` steps; else None.

    All live sequences grow by one token a step, so an order stays until sequences end or start.
    """
    order = np.argsort(-lengths, kind="stable")
    moved = int(lengths[order != np.arange(len(order))].sum())
    if moved == 0:
        return None
    costs = [
        tokens_read(each, ranges(each, range_cost=range_cost), range_cost=range_cost)
        for each in (lengths, lengths[order])
    ]
    return order if horizon * (costs[0] - costs[1]) > 2 * moved else None


def _best_cut(lengths: np.ndarray, range_cost: int) -> int:
    """Where to split in two, or 0."""
    count = len(lengths)
    if count < 2:
        return 0
    longest = np.maximum.accumulate(lengths)[:-1]
    longest_after = np.maximum.accumulate(lengths[::-1])[::-1][1:]
    left = np.arange(1, count)
    read = longest * left + longest_after * (count - left)
    cut = int(read.argmin())
    whole = int(max(longest[-1], lengths[-1])) * count
    return cut + 1 if whole - int(read[cut]) > range_cost else 0
