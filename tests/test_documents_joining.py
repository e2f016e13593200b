"""Sheets of several pages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.documents.joining import join, joined
from engine.documents.page import Page


def page(number: int, tags: list[str] | None = None) -> Page:
    return Page(
        id=f"p{number}", words=["a", f"b{number}"], boxes=[(0, 0, 500, 100), (500, 900, 1000, 1000)], tags=tags,
        fields={"total": "1"}, links=[(0, 1)],
    )  # fmt: skip


def test_pages_stand_side_by_side_and_are_read_one_after_the_other() -> None:
    sheet = join([page(number, ["O", "B-total"]) for number in range(6)])
    assert sheet.id == "p0+5"
    assert sheet.words == ["a", "b0", "a", "b1", "a", "b2", "a", "b3", "a", "b4", "a", "b5"]
    assert sheet.boxes[0] == (0, 0, 166, 50)  # three across, two down
    assert sheet.boxes[3] == (500, 450, 666, 500)
    assert sheet.boxes[10] == (666, 500, 833, 550)
    assert sheet.tags == ["O", "B-total"] * 6
    assert sheet.links == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert sheet.fields == {}
    assert join([page(0, ["O", "O"]), page(1)]).tags is None
    with pytest.raises(ValueError, match="pages: got none"):
        join([])


@given(st.integers(1, 20), st.integers(1, 8))
def test_every_word_is_there_once_and_inside_its_part(count: int, together: int) -> None:
    pages = [page(number) for number in range(count)]
    sheets = list(joined(pages, together))
    assert [word for sheet in sheets for word in sheet.words] == [word for one in pages for word in one.words]
    assert len({sheet.id for sheet in sheets}) == len(sheets) == -(-count // together)
    for sheet in sheets:
        firsts = sheet.boxes[::2]
        assert len(set(firsts)) == len(firsts)
