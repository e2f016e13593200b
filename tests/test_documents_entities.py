"""Entity scores in seqeval's two readings, and fields from tags."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.documents.entities import TypeScore, fields_from_tags, score_tags
from engine.documents.tags import spans, tags_of

GOLD = ["B-a", "I-a", "O", "B-b"]


def test_the_default_reading_lets_an_entity_begin_inside_the_strict_one_does_not() -> None:
    scores = score_tags([GOLD], [["I-a", "I-a", "O", "B-b"]])
    assert scores.default.micro == TypeScore(1.0, 1.0, 1.0, 2)
    assert scores.strict.micro == TypeScore(1.0, 0.5, pytest.approx(2 / 3), 2)
    assert scores.strict.types == {"a": TypeScore(0.0, 0.0, 0.0, 1), "b": TypeScore(1.0, 1.0, 1.0, 1)}


def test_words_that_were_not_read_are_misses() -> None:
    scores = score_tags([GOLD, GOLD], [GOLD, GOLD[:2]])
    assert scores.missing_words == 2
    assert scores.strict.micro == scores.default.micro == TypeScore(1.0, 0.75, pytest.approx(6 / 7), 4)


def test_wrong_types_and_bounds_count_on_both_sides() -> None:
    scores = score_tags([GOLD], [["B-a", "O", "O", "B-c"]])
    assert scores.strict.micro == scores.default.micro == TypeScore(0.0, 0.0, 0.0, 2)
    assert scores.strict.types["c"] == TypeScore(0.0, 0.0, 0.0, 0)


def test_pages_without_entities() -> None:
    assert score_tags([["O"]], [["O"]]).strict.micro == TypeScore(0.0, 0.0, 0.0, 0)
    assert score_tags([["O"]], [["I-a"]]).strict.micro == TypeScore(0.0, 0.0, 0.0, 0)
    assert score_tags([["B-a"]], [["I-a"]]).default.types == {"a": TypeScore(1.0, 1.0, 1.0, 1)}
    assert score_tags([], []).default.types == {}


def test_tags_that_seqeval_would_misread_are_refused() -> None:
    with pytest.raises(ValueError, match="page 0: got the tag 'B_a', expected 'O', 'B-TYPE' or 'I-TYPE'"):
        score_tags([["O"]], [["B_a"]])
    with pytest.raises(ValueError, match=r"predicted\[0\]: got 2 tags, expected at most 1"):
        score_tags([["O"]], [["O", "O"]])
    with pytest.raises(ValueError, match="predicted: got 0 pages, expected 1"):
        score_tags([["O"]], [])


tag = st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"])
pages = st.lists(st.lists(st.tuples(tag, tag), min_size=1, max_size=12), min_size=1, max_size=4)


@given(pages)
def test_the_scores_are_those_of_span_sets(pages: list[list[tuple[str, str]]]) -> None:
    gold = [tags_of(spans([true for true, _ in page]), len(page)) for page in pages]
    predicted = [[tag for _, tag in page] for page in pages]
    true = {(number, span) for number, tags in enumerate(gold) for span in spans(tags)}
    found = {(number, span) for number, tags in enumerate(predicted) for span in spans(tags)}
    scores = score_tags(gold, predicted)
    hits = len(true & found)
    assert scores.default.micro.f1 == pytest.approx(2 * hits / max(len(true) + len(found), 1))
    assert scores.default.micro.support == scores.strict.micro.support == len(true)
    assert scores.strict.micro.recall <= scores.default.micro.recall
    assert score_tags(gold, gold).strict.micro.f1 == float(bool(true))


def test_fields_from_tags() -> None:
    words = ["ACME", "SDN", "DATE:01/02/2018", "TOTAL:4.10", "RM", "5.00", "ACME", "later"]
    tags = ["B-company", "I-company", "B-date", "B-total", "B-total", "I-total", "B-company"]
    assert fields_from_tags(words, tags) == {"company": "ACME SDN", "date": "01/02/2018", "total": "RM 5.00"}
    assert fields_from_tags(words, ["I-date", "B-total"]) == {"date": "ACME", "total": "SDN"}
    assert fields_from_tags([], []) == {}
