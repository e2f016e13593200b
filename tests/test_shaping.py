"""The overlong punishment and the dynamic-sampling filter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shaping import informative, overlong_penalty

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))


def test_published_penalties() -> None:
    inputs, expected = VECTORS["D1"]["inputs"], VECTORS["D1"]["expected"]["paper"]
    got = [
        overlong_penalty(length, max_length=inputs["L_max"], cache=inputs["L_cache"]) for length in inputs["lengths"]
    ]
    assert got == pytest.approx(expected, abs=1e-6)


def test_published_rewards() -> None:
    inputs, expected = VECTORS["D2"]["inputs"], VECTORS["D2"]["expected"]
    penalties = [
        overlong_penalty(length, max_length=inputs["L_max"], cache=inputs["L_cache"]) for length in inputs["lengths"]
    ]
    assert [1 + penalty for penalty in penalties] == pytest.approx(expected["correct"])
    assert [-1 + penalty for penalty in penalties] == pytest.approx(expected["wrong"])


@given(length=st.integers(0, 100), max_length=st.integers(1, 60), data=st.data())
def test_penalty_falls_from_zero_to_minus_one(length: int, max_length: int, data: st.DataObject) -> None:
    cache = data.draw(st.integers(1, max_length))
    penalty = overlong_penalty(length, max_length=max_length, cache=cache)
    assert -1 <= overlong_penalty(length + 1, max_length=max_length, cache=cache) <= penalty <= 0
    assert (penalty == 0) == (length <= max_length - cache)
    assert (penalty == -1) == (length >= max_length)


@pytest.mark.parametrize("cache", [0, -1, 11])
def test_penalty_refuses_an_impossible_cache(cache: int) -> None:
    with pytest.raises(ValueError, match=f"cache: got {cache}, expected 1 to max_length = 10"):
        overlong_penalty(5, max_length=10, cache=cache)


VERDICTS = [
    ([True, False], True),
    ([False, False, True], True),
    ([True, True], False),
    ([False, False, False], False),
    ([True], False),
    ([], False),
]


@pytest.mark.parametrize(("correct", "expected"), VERDICTS)
def test_informative(correct: list[bool], expected: bool) -> None:
    assert informative(correct) is expected
