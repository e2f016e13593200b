"""Pages, their files, tags and rows."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.documents.page import Page, TaskError, normalise_box, read_pages, write_pages
from engine.documents.rows import rows
from engine.documents.tags import Span, spans, tag_fault, tags_of

PAGE = Page(
    id="a", words=["Total", "7.10"], boxes=[(0, 0, 100, 20), (900, 0, 1000, 20)], tags=["O", "B-total"],
    fields={"total": "7.10"}, links=[(0, 1)], family="receipt", template="receipt-03",
)  # fmt: skip


@pytest.mark.parametrize("name", ["pages.jsonl", "pages.jsonl.gz"])
def test_pages_come_back_from_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    untagged = Page(id="b", words=[], boxes=[])
    assert write_pages(path, [PAGE, untagged]) == 2
    assert list(read_pages(path)) == [PAGE, untagged]
    before = path.read_bytes()
    write_pages(path, [PAGE, untagged])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, 1, 1]]}, r"boxes: got 1, expected one for each of the 2 words"),
        ({"boxes": [[0, 0, 1, 1], [0, 5, 1001, 6]]}, r"boxes\[1\]: got \(0, 5, 1001, 6\), expected"),
        ({"boxes": [[-1, 0, 1, 1], [0, 5, 1, 6]]}, r"boxes\[0\]: got \(-1, 0, 1, 1\)"),
        ({"boxes": [[0, 0, 1, 1], [0, 7, 1, 6]]}, r"boxes\[1\]: got \(0, 7, 1, 6\)"),
        ({"tags": ["B_total", "O"]}, r"tags\[0\]: got 'B_total', expected 'O', 'B-TYPE' or 'I-TYPE'"),
        ({"tags": ["O", "I-total"]}, r"tags\[1\]: got 'I-total' after 'O', expected 'B-total'"),
        ({"tags": ["O"]}, r"tags: got 1, expected one for each"),
        ({"words": ["Total", " "]}, r"words\[1\]: got ' '"),
        ({"links": [[0, 2]]}, r"links\[0\]: got \(0, 2\), expected word indices below 2"),
        ({"links": [[-1, 1]]}, r"links\[0\]: got \(-1, 1\)"),
        ({"words": "Total"}, r"Expected `array`, got `str` - at `\$.words`"),
        ({"id": ""}, r"id: got an empty text"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "pages.jsonl"
    good = msgspec.to_builtins(PAGE)
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(good | change)}\n")
    with pytest.raises(TaskError, match=rf"pages\.jsonl:3: not a page: .*{message}"):
        list(read_pages(path))


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "a", "words": [], "boxes": []}\n' * 999)[:-20])
    with pytest.raises(TaskError, match=r"pages\.jsonl\.gz:\d+: broken gzip data"):
        list(read_pages(path))


def test_nothing_is_left_where_writing_fails(tmp_path: Path) -> None:
    def pages():
        yield PAGE
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_pages(tmp_path / "pages.jsonl.gz", pages())
    assert list(tmp_path.iterdir()) == []


def test_boxes_are_thousandths_and_stay_on_the_page() -> None:
    assert normalise_box((10, 20, 60, 30), 200, 100) == ((50, 200, 300, 300), False)
    assert normalise_box((60, 30, 10, 20), 200, 100) == ((50, 200, 300, 300), False)
    assert normalise_box((0, 0, 200, 100), 200, 100) == ((0, 0, 1000, 1000), False)
    assert normalise_box((-5, 20, 60, 130), 200, 100) == ((0, 200, 300, 1000), True)


tag = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"])


@settings(deadline=None)
@given(st.lists(tag))
def test_spans_and_tags_are_inverse_where_tags_are_bio(tags: list[str]) -> None:
    again = tags_of(spans(tags), len(tags))
    assert tag_fault(again) is None
    assert (again == tags) == (tag_fault(tags) is None)
    assert spans(again) == spans(tags)


def test_spans_share_no_word() -> None:
    with pytest.raises(ValueError, match="word 1: is in an entity 'b' and is tagged 'I-a' already"):
        tags_of([Span("a", 0, 2), Span("b", 1, 3)], 3)


@pytest.mark.parametrize("slope", [0, 1 / 40, 1 / 30, -1 / 30])
def test_rows_of_a_slightly_turned_scan(slope: float) -> None:
    boxes = [
        (x, 100 + slope * x + 30 * line, x + 80, 120 + slope * x + 30 * line) for line in (1, 0) for x in (400, 0, 200)
    ]
    assert rows(boxes) == [[4, 5, 3], [1, 2, 0]]


def test_rows_that_touch_stay_apart() -> None:
    assert rows([(0, 0, 9, 20), (0, 17, 9, 37), (20, 1, 29, 21), (20, 18, 29, 38)]) == [[0, 2], [1, 3]]


def test_flat_boxes_have_rows_too() -> None:
    assert rows([(0, 5, 1, 5), (2, 5, 3, 5), (0, 9, 1, 9), (4, 0, 5, 8)]) == [[0, 1, 3], [2]]


edge = st.integers(0, 60)


@settings(deadline=None)
@given(st.lists(st.tuples(edge, edge, edge, edge).map(lambda b: (*sorted(b[:2]), *sorted(b[2:])))))
def test_each_box_is_in_one_row(raw: list[tuple[int, int, int, int]]) -> None:
    boxes = [(x0, y0, x1, y1) for x0, x1, y0, y1 in raw]
    found = rows(boxes)
    assert sorted(index for row in found for index in row) == list(range(len(boxes)))
    assert all(boxes[a][0] <= boxes[b][0] for row in found for a, b in pairwise(row))
