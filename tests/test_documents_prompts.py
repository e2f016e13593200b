"""The prompt of a page: rows with their places, within a budget."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.documents.page import Page
from engine.documents.prompts import extraction_prompt, page_text

PAGE = Page(
    id="r1",
    words=["ACME", "SDN", "BHD", "TOTAL", ":", "7.10", "CASH", "8.00"],
    boxes=[
        (300, 20, 380, 40), (400, 20, 460, 40), (480, 21, 540, 41),
        (100, 100, 200, 120), (210, 100, 220, 120), (700, 104, 780, 124), (100, 130, 180, 150), (700, 131, 780, 151),
    ],
    fields={"company": "ACME SDN BHD", "total": "7.10", "date": "01/02/2018"},
)  # fmt: skip


def test_rows_with_the_places_of_their_texts() -> None:
    assert page_text(PAGE) == ["20 @300 ACME SDN BHD", "100 @100 TOTAL : @700 7.10", "130 @100 CASH @700 8.00"]


def test_the_question_and_the_page() -> None:
    prompt = extraction_prompt(PAGE, ["company", "total"], max_characters=1000)
    assert "fields from the document below: company, total." in prompt
    assert "JSON object" in prompt
    assert prompt.endswith("\n\n20 @300 ACME SDN BHD\n100 @100 TOTAL : @700 7.10\n130 @100 CASH @700 8.00")


def test_a_long_page_loses_its_middle() -> None:
    words = [f"w{number}" for number in range(50)]
    page = Page(id="a", words=words, boxes=[(0, 20 * number, 100, 20 * number + 9) for number in range(50)])
    whole = extraction_prompt(page, ["total"], max_characters=10_000)
    cut = extraction_prompt(page, ["total"], max_characters=len(whole) - 1)
    assert len(cut) <= len(whole) - 1
    assert "w0\n20 @0 w1\n" in cut
    assert cut.endswith("\n980 @0 w49")
    assert "\n440 @0 w22\n" in cut
    assert "\n[2 rows left out]\n" in cut
    short = extraction_prompt(page, ["total"], max_characters=len(whole.partition("\n\n")[0]) + 2 + 18)
    assert short.endswith("\n\n[50 rows left out]")
    with pytest.raises(
        ValueError, match=r"max_characters: got 100, expected at least \d+, which the question for 1 fields"
    ):
        extraction_prompt(page, ["total"], max_characters=100)


edge = st.integers(0, 1000)
word = st.text("ab1@|", min_size=1, max_size=9)
placed = st.tuples(word, st.tuples(edge, edge, edge, edge).map(lambda e: (*sorted(e[:2]), *sorted(e[2:]))))


@given(st.lists(placed, max_size=30), st.integers(0, 900))
def test_the_budget_holds_and_no_row_is_lost_within_it(placed: list, room: int) -> None:
    page = Page(id="a", words=[w for w, _ in placed], boxes=[(x0, y0, x1, y1) for _, (x0, x1, y0, y1) in placed])
    question = extraction_prompt(Page(id="b", words=[], boxes=[]), ["total"], max_characters=1000)
    prompt = extraction_prompt(page, ["total"], max_characters=len(question) + 18 + room)
    assert len(prompt) <= len(question) + 18 + room
    texts = page_text(page)
    assert Counter(page.words) <= Counter(word for text in texts for word in text.split())
    if len("\n".join(texts)) <= room + 18:
        assert prompt == question + "\n".join(texts)
    else:
        assert " rows left out]" in prompt
