"""Neighbours on pages drawn by hand, and against the rule written out word by word."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.utel.pretraining.neighbours import NONE, nearest, neighbours

Box = tuple[int, int, int, int]


def around(boxes: list[Box], anchor: int, **options: int) -> list[int]:
    """left, right, up, down"""
    return neighbours(np.array(boxes), np.array([anchor]), **options)[0].tolist()


GRID = [(100 * x, 100 * y, 100 * x + 60, 100 * y + 40) for y in range(3) for x in range(3)]


def test_a_grid() -> None:
    assert around(GRID, 4) == [3, 5, 1, 7]
    assert around(GRID, 0) == [NONE, 1, NONE, 3]
    assert around(GRID, 8) == [7, NONE, 5, NONE]


def test_a_gap_beyond_the_cut_off_is_no_neighbour() -> None:
    row = [(0, 0, 50, 20), (300, 0, 350, 20)]
    assert around(row, 0) == [NONE, 1, NONE, NONE]  # a gap of 250, a quarter of the page
    assert around([row[0], (301, 0, 351, 20)], 0) == [NONE] * 4
    column = [(0, 0, 50, 20), (0, 271, 50, 290)]
    assert around(column, 0) == [NONE] * 4
    assert around(column, 0, cutoff=251) == [NONE, NONE, NONE, 1]


def test_beside_means_half_of_the_lower_ones_height() -> None:
    tall = (0, 0, 50, 100)
    assert around([tall, (60, 90, 100, 110)], 0)[1] == 1  # 10 of 20
    assert around([tall, (60, 91, 100, 111)], 0)[1] == NONE  # 9 of 20
    assert around([tall, (60, 91, 100, 111)], 0)[3] == NONE  # and nothing in common sideways


def test_above_means_any_width_in_common() -> None:
    assert around([(0, 0, 50, 20), (49, 40, 90, 60)], 0)[3] == 1
    assert around([(0, 0, 50, 20), (50, 40, 90, 60)], 0)[3] == NONE


def test_overlapping_words_have_no_gap_and_the_centres_decide() -> None:
    """Two that overlap the anchor: the one whose centre is level with it; then reading order."""
    anchor = (0, 100, 100, 140)
    assert around([anchor, (80, 115, 150, 155), (60, 100, 190, 140)], 0)[1] == 2
    assert around([anchor, (80, 90, 150, 130), (60, 110, 190, 150)], 0)[1] == 1
    assert around([anchor, (300, 100, 310, 140), (80, 115, 150, 155)], 0)[1] == 2  # a gap comes first


def test_words_without_width_or_height() -> None:
    flat = [(0, 50, 40, 50), (60, 50, 90, 50), (60, 400, 90, 400)]
    assert around(flat, 0) == [NONE, 1, NONE, NONE]
    thin = [(10, 0, 10, 20), (10, 40, 10, 60)]
    assert around(thin, 0) == [NONE] * 4


def test_one_word_and_none() -> None:
    assert around([(0, 0, 10, 10)], 0) == [NONE] * 4
    assert neighbours(np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.int64)).shape == (0, 4)
    assert neighbours(np.array(GRID), np.zeros(0, dtype=np.int64)).shape == (0, 4)


def test_the_same_box_twice_is_on_no_side() -> None:
    assert around([(0, 0, 10, 10), (0, 0, 10, 10)], 0) == [NONE] * 4


def by_the_rule(boxes: list[Box], anchor: int, direction: int, cutoff: int) -> int:
    """Section by section, in plain Python."""

    def centre(box: Box, axis: int) -> float:
        return (box[axis] + box[axis + 2]) / 2

    axis, sign = direction // 2, 1 if direction % 2 else -1
    a = boxes[anchor]
    found = []
    for index, b in enumerate(boxes):
        common = min(a[3 - axis], b[3 - axis]) - max(a[1 - axis], b[1 - axis])
        lower = min(a[3] - a[1], b[3] - b[1])
        beside = common >= 0.5 * lower if axis == 0 else common > 0
        gap = max(0, b[axis] - a[axis + 2], a[axis] - b[axis + 2])
        if sign * (centre(b, axis) - centre(a, axis)) > 0 and beside and gap <= cutoff:
            found.append((gap, abs(centre(b, 1 - axis) - centre(a, 1 - axis)), index))
    return min(found)[2] if found else NONE


edge = st.integers(0, 40).map(lambda n: 25 * n)
box = st.tuples(edge, edge, edge, edge).map(
    lambda e: (min(e[0], e[2]), min(e[1], e[3]), max(e[0], e[2]), max(e[1], e[3]))
)


@settings(max_examples=150, deadline=None)
@given(boxes=st.lists(box, min_size=1, max_size=12), cutoff=st.sampled_from([0, 100, 250, 1000]))
def test_it_is_the_rule(boxes: list[Box], cutoff: int) -> None:
    found = neighbours(np.array(boxes), np.arange(len(boxes)), cutoff=cutoff)
    expected = [[by_the_rule(boxes, anchor, d, cutoff) for d in range(4)] for anchor in range(len(boxes))]
    assert found.tolist() == expected


def test_the_nearest_words() -> None:
    assert nearest(np.array(GRID), 0, np.arange(1, 9), 3).tolist() == [1, 3, 4]
