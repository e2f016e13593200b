"""What pages are asked: what is hidden, what is not, and that the draws hang on nothing else."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.utel.encode import Window, encode_page, lay_out, windows
from engine.utel.pretraining.config import CweConfig, MllmConfig, PretrainingConfig, SwpConfig
from engine.utel.pretraining.views import Example, make_example
from tests.utel_pages import make_boxes, make_page, make_pieces

PIECES = make_pieces()
NO_CWE = PretrainingConfig(cwe=CweConfig(weight=0))
ALL = PretrainingConfig()


def example(config: PretrainingConfig, count: int = 60, seed: int = 1, *, step: int = 3) -> tuple[Window, Example]:
    [window] = windows(make_page(PIECES, count, seed), 2048)
    return window, make_example(window, PIECES, config, seed=5, step=step)


def same(one: Example, other: Example) -> bool:
    arrays = [
        [
            *(x for view in e.views for x in (view.row.ids, view.row.boxes, view.mllm.at, view.mllm.labels)),
            *(x for view in e.views for x in (view.swp.at, view.swp.asked, view.swp.labels)),
            *(e.cwe.at, e.cwe.hidden, e.cwe.repeated),
        ]
        for e in (one, other)
    ]
    return all(np.array_equal(a, b) for a, b in zip(*arrays, strict=True))


# --- masked words --------------------------------------------------------------------------------------------------


def test_words_are_masked_whole_and_boxes_stay() -> None:
    for seed in range(20):
        window, made = example(NO_CWE, seed=seed)
        [view], row = made.views, lay_out(window, PIECES)
        assert np.array_equal(view.row.boxes, row.boxes)
        asked = np.unique(row.word[view.mllm.at])
        assert np.array_equal(view.mllm.at, np.flatnonzero(np.isin(row.word, asked)))
        assert len(asked) == round(0.15 * len(window))
        assert np.array_equal(view.mllm.labels, row.ids[view.mllm.at])
        untouched = np.setdiff1d(np.arange(len(row.ids)), view.mllm.at)
        assert np.array_equal(view.row.ids[untouched], row.ids[untouched])
        for word in asked:
            masked = view.row.ids[row.word == word] == PIECES.mask
            assert masked.all() or not masked.any()


@pytest.mark.parametrize("unit", ["word", "token"])
def test_the_shares_are_80_10_10(unit: str) -> None:
    config = msgspec.structs.replace(NO_CWE, mllm=MllmConfig(unit=unit))
    masked = replaced = left = 0
    for seed in range(60):
        window, made = example(config, count=200, seed=seed)
        [view] = made.views
        ids, labels = view.row.ids[view.mllm.at], view.mllm.labels
        masked += int((ids == PIECES.mask).sum())
        left += int((ids == labels).sum())
        replaced += int(((ids != labels) & (ids != PIECES.mask)).sum())
        assert not np.isin(ids[ids != PIECES.mask], [PIECES.pad, PIECES.cls, PIECES.sep]).any()
        if unit == "token":
            assert len(labels) == round(0.15 * (window.length - 2))
    total = masked + replaced + left
    assert masked / total == pytest.approx(0.8, abs=0.03)
    assert replaced / total == pytest.approx(0.1, abs=0.025)
    assert left / total == pytest.approx(0.1, abs=0.025)


def test_a_short_page_is_asked_something_too() -> None:
    _, made = example(NO_CWE, count=1)
    assert len(made.views[0].mllm.at) >= 1
    assert len(made.views[0].swp.at) == 0
    _, made = example(ALL, count=1)
    assert len(made.views) == 2
    assert len(made.cwe.at) == 0
    _, made = example(ALL, count=2)
    assert made.cwe.hidden.sum() == 1


# --- surrounding words ---------------------------------------------------------------------------------------------


def test_the_answer_is_the_first_sub_token_of_the_word_there() -> None:
    """On a grid of six columns left is one back, down six on."""
    step = {0: -1, 1: 1, 2: -6, 3: 6}
    for seed in range(20):
        window, made = example(NO_CWE, seed=seed)
        [view], starts = made.views, window.starts
        anchors = np.searchsorted(starts, view.swp.at)
        assert np.array_equal(starts[anchors], view.swp.at)
        assert not np.isin(anchors, view.row.word[view.mllm.at]).any()
        assert len(np.unique(anchors)) == round(0.15 * 60)
        asked = set(zip(anchors.tolist(), view.swp.asked.tolist(), strict=True))
        for anchor in np.unique(anchors).tolist():
            column, line = anchor % 6, anchor // 6
            there = {0: column > 0, 1: column < 5, 2: line > 0, 3: line < 9}
            assert {d for a, d in asked if a == anchor} == {d for d, is_there in there.items() if is_there}
        originals = window.page.first_tokens
        expected = [originals[a + step[d]] for a, d in zip(anchors.tolist(), view.swp.asked.tolist(), strict=True)]
        assert view.swp.labels.tolist() == expected
        following = originals[np.minimum(anchors + 1, 59)]
        assert np.array_equal(view.swp.in_order, following)


def test_neighbours_outside_of_the_window_are_not_asked_for() -> None:
    page = make_page(PIECES, 60, 1)
    for window in windows(page, 40):
        made = make_example(window, PIECES, NO_CWE, seed=0, step=0)
        [view] = made.views
        for place, direction, label in zip(view.swp.at, view.swp.asked, view.swp.labels, strict=True):
            word = int(np.searchsorted(window.starts, place)) + window.first
            other = word + {0: -1, 1: 1, 2: -6, 3: 6}[int(direction)]
            assert window.first <= other < window.stop
            assert label == page.first_tokens[other]


def test_pairs_hide_the_anchor_and_have_negatives() -> None:
    config = msgspec.structs.replace(NO_CWE, swp=SwpConfig(reading="pair"))
    for seed in range(10):
        window, made = example(config, seed=seed)
        [view], starts = made.views, window.starts
        first, second = np.searchsorted(starts, view.swp.at), np.searchsorted(starts, view.swp.asked)
        expected = {1: -1, 2: 1, 3: -6, 4: 6}
        for a, b, label in zip(first.tolist(), second.tolist(), view.swp.labels.tolist(), strict=True):
            assert a != b
            assert (b - a == expected[label]) if label else True
        for anchor in np.unique(first):
            own = view.swp.labels[first == anchor]
            assert (own == 0).sum() == 3 * (own > 0).sum()
            assert len(np.unique(second[first == anchor])) == len(own)
        hidden = np.unique(view.row.word[(view.row.boxes == 0).all(axis=1) & (view.row.word >= 0)])
        assert len(hidden) == round(0.15 * 60)
        assert set(first) <= set(hidden)
        assert not set(second) & set(hidden)
    shown = msgspec.structs.replace(config, swp=SwpConfig(reading="pair", hide_anchor=False))
    window, made = example(shown)
    assert np.array_equal(made.views[0].row.boxes, lay_out(window, PIECES).boxes)


# --- two views -----------------------------------------------------------------------------------------------------


def test_the_hidden_half_is_hidden_in_complementary_ways() -> None:
    for seed in range(20):
        window, made = example(ALL, seed=seed)
        one, two = made.views
        row, cwe = lay_out(window, PIECES), made.cwe
        assert len(cwe.at) == 60
        assert cwe.hidden.sum() == 30
        words = np.searchsorted(window.starts, cwe.at[cwe.hidden])
        inside = np.isin(row.word, words)
        assert (one.row.ids[inside] == PIECES.mask).all()
        assert (one.row.boxes[inside] != 0).any(axis=1).all()
        assert (two.row.boxes[inside] == 0).all()
        assert np.array_equal(two.row.ids[inside], row.ids[inside])
        for view in (one, two):
            assert not np.isin(row.word[view.mllm.at], words).any()
            assert not np.isin(row.word[view.swp.at], words).any()
        assert (two.row.boxes[~inside & (row.word >= 0)] != 0).any(axis=1).all()
        assert not np.array_equal(one.mllm.at, two.mllm.at)


def test_neighbours_whose_box_is_out_of_sight_are_not_asked_for() -> None:
    window, made = example(ALL)
    hidden = np.searchsorted(window.starts, made.cwe.at[made.cwe.hidden])
    step = {0: -1, 1: 1, 2: -6, 3: 6}

    def others(view: int) -> set[int]:
        swp = made.views[view].swp
        anchors = np.searchsorted(window.starts, swp.at).tolist()
        return {a + step[d] for a, d in zip(anchors, swp.asked.tolist(), strict=True)}

    assert others(0) & set(hidden.tolist())
    assert not others(1) & set(hidden.tolist())


def test_views_are_moved_and_scaled_as_a_whole() -> None:
    config = msgspec.structs.replace(ALL, cwe=CweConfig(hidden=0.0))
    scales = []
    for seed in range(30):
        window, made = example(config, seed=seed)
        boxes = window.boxes.astype(float)
        for view in made.views:
            moved = view.row.boxes[window.starts[:-1]]
            free = ((moved > 0) & (moved < 1000)).all(axis=1)
            if free.sum() > 20:
                scales.append(float(np.polyfit(boxes[free, 0], moved[free, 0], 1)[0]))
            assert view.row.boxes[0].tolist() == [0] * 4
            assert view.row.boxes[-1].tolist() == [1000] * 4
            assert moved.min() >= 0
            assert moved.max() <= 1000
    assert 0.89 < min(scales) < 0.95
    assert 1.05 < max(scales) < 1.11
    assert np.array_equal(example(NO_CWE)[1].views[0].row.boxes, lay_out(example(NO_CWE)[0], PIECES).boxes)


def test_repeated_texts_are_known() -> None:
    words = ["ab", "cd", "ab", "k"]
    [window] = windows(encode_page(PIECES, words, make_boxes(4), id="x"), 64)
    cwe = make_example(window, PIECES, ALL, seed=0, step=0).cwe
    assert cwe.repeated.tolist() == [True, False, True, False]
    assert cwe.at.tolist() == window.starts[:-1].tolist()


def test_at_most_so_many_blocks_are_sampled() -> None:
    config = msgspec.structs.replace(ALL, cwe=CweConfig(blocks=16))
    _, made = example(config)
    assert (len(made.cwe.at), made.cwe.hidden.sum()) == (16, 8)
    assert (np.diff(made.cwe.at) > 0).all()


# --- draws ---------------------------------------------------------------------------------------------------------


def test_draws_hang_on_seed_step_page_and_window() -> None:
    page = make_page(PIECES, 60, 1)
    first, second = windows(page, 2048)[0], windows(page, 100)[1]
    made = make_example(first, PIECES, ALL, seed=1, step=2)
    assert same(made, make_example(first, PIECES, ALL, seed=1, step=2))
    assert not same(made, make_example(first, PIECES, ALL, seed=1, step=3))
    assert not same(made, make_example(first, PIECES, ALL, seed=2, step=2))
    twin = encode_page(PIECES, ["a"] * 60, make_boxes(60), id="other")
    assert not np.array_equal(
        make_example(windows(twin, 2048)[0], PIECES, NO_CWE, seed=1, step=2).views[0].mllm.at,
        make_example(
            windows(encode_page(PIECES, ["a"] * 60, make_boxes(60), id="another"), 2048)[0],
            PIECES,
            NO_CWE,
            seed=1,
            step=2,
        )
        .views[0]
        .mllm.at,
    )
    assert second.first > 0


def test_leaving_a_task_out_changes_no_other_tasks_draws() -> None:
    without_swp = msgspec.structs.replace(ALL, swp=SwpConfig(weight=0))
    without_mllm = msgspec.structs.replace(ALL, mllm=MllmConfig(weight=0))
    whole = example(ALL)[1]
    for config in (without_swp, without_mllm):
        other = example(config)[1]
        assert np.array_equal(other.cwe.at, whole.cwe.at)
        assert np.array_equal(other.cwe.hidden, whole.cwe.hidden)
        assert np.array_equal(other.views[1].row.boxes, whole.views[1].row.boxes)
    assert np.array_equal(example(without_swp)[1].views[0].mllm.at, whole.views[0].mllm.at)
    assert len(example(without_mllm)[1].views[0].mllm.at) == 0


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 30),
    length=st.integers(3, 40),
    unit=st.sampled_from(["word", "token"]),
    reading=st.sampled_from(["vocabulary", "pair"]),
    cwe=st.sampled_from([0.0, 1.0]),
    rate=st.sampled_from([0.0, 0.15, 0.9, 1.0]),
)
def test_any_page_makes_sound_examples(
    count: int, length: int, unit: str, reading: str, cwe: float, rate: float
) -> None:
    config = msgspec.convert(
        {"mllm": {"unit": unit, "rate": rate}, "swp": {"reading": reading, "rate": rate}, "cwe": {"weight": cwe}},
        PretrainingConfig,
    )
    for window in windows(make_page(PIECES, count, count), length):
        made = make_example(window, PIECES, config, seed=0, step=0)
        assert len(made.views) == (2 if cwe else 1)
        for view in made.views:
            assert len(view.row.ids) == window.length
            assert view.row.boxes.min() >= 0
            assert view.row.boxes.max() <= 1000
            assert len(view.mllm.at) == len(view.mllm.labels)
            assert len(view.swp.at) == len(view.swp.asked) == len(view.swp.labels) == len(view.swp.in_order)
            for places in (view.mllm.at, view.swp.at):
                assert ((places > 0) & (places < window.length - 1)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mllm": {"rate": 1.5}}, "mllm.rate: got 1.5, expected 0 to 1"),
        ({"swp": {"weight": -1}}, "swp.weight: got -1"),
        ({name: {"weight": 0} for name in ("mllm", "swp", "cwe")}, "got 0 for each"),
        ({"cwe": {"temperature": 0}}, "cwe.temperature: got 0"),
        ({"cwe": {"blocks": 1}}, "cwe.blocks: got 1"),
        ({"length": 2}, "length: got 2"),
        ({"cwe": {"tau": 1}}, "unknown field `tau`"),
    ],
)
def test_settings_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(fields, PretrainingConfig)
