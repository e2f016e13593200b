"""From a tagger's figures to entities and fields."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.documents.page import Page
from engine.documents.tags import Span, spans
from engine.utel.decoding import best_fields, entities, likeliest, log_probabilities
from engine.utel.habits import Habits, line_edges
from engine.utel.tagging import make_labels, to_labels, to_tags

BIES, BIO = make_labels(["date", "total"]), make_labels(["date", "total"], "BIO")
WORDS = ["SHOP", "01/02/2018", "TOTAL", "7.50", "CASH", "10.00", "PAID", "7.50"]


RECEIPTS = {"company": Habits(begins=5.0, ends=1.1), "total": Habits(no_cents=6.8, not_positive=4.0, odd_cents=1.5)}
"""About those of SROIE's receipts."""


def page_of(words: list[str], lines: list[int] | None = None) -> Page:
    """`lines` numbers each word's line; by itself every word is one."""
    numbers = lines or list(range(len(words)))
    boxes = [(10 * place, 20 * line, 10 * place + 9, 20 * line + 9) for place, line in enumerate(numbers)]
    return Page(id="p", words=words, boxes=boxes)


def figures(labels: list[str], probabilities: list[dict[str, float]]) -> np.ndarray:
    """Logits of words with these probabilities; what is left goes evenly to the other labels."""
    rows = []
    for given_ in probabilities:
        rest = (1 - sum(given_.values())) / (len(labels) - len(given_))
        rows.append([np.log(given_.get(label, rest)) for label in labels])
    return np.array(rows, dtype=np.float32)


def is_whole(path: list[int], labels: list[str]) -> bool:
    """Every entity begins and ends as its scheme says: the tags say again what the labels said."""
    return to_labels(to_tags(path, labels), labels).tolist() == path


@settings(max_examples=25, deadline=None)
@given(data=st.data(), words=st.integers(1, 4), bies=st.booleans())
def test_the_likeliest_sequence_that_can_be(data: st.DataObject, words: int, bies: bool) -> None:
    labels = make_labels(["a"], "BIES" if bies else "BIO")
    draw = st.lists(st.floats(-4, 4, width=32), min_size=len(labels), max_size=len(labels))
    logits = np.array(data.draw(st.lists(draw, min_size=words, max_size=words)), dtype=np.float32)
    path = likeliest(logits, labels)
    assert is_whole(path, labels)
    scores = log_probabilities(logits)
    best = max(
        sum(scores[word, label] for word, label in enumerate(other))
        for other in np.ndindex(*[len(labels)] * words)
        if is_whole(list(other), labels)
    )
    assert sum(scores[word, label] for word, label in enumerate(path)) == pytest.approx(best, abs=1e-4)


def test_an_entity_keeps_its_words_together() -> None:
    """By itself the second word's likeliest label is "O"."""
    logits = figures(BIES, [{"B-date": 0.9}, {"O": 0.5, "I-date": 0.45}, {"E-date": 0.9}])
    [entity] = entities(logits, BIES)
    assert (entity.type, entity.start, entity.stop) == ("date", 0, 3)
    assert entity.confidence == pytest.approx((0.9 * 0.45 * 0.9) ** (1 / 3), rel=1e-3)
    assert entities(np.zeros((0, len(BIES)), dtype=np.float32), BIES) == []


@pytest.mark.parametrize("labels", [BIES, BIO])
def test_equal_values_at_several_places_stand_by_each_other(labels: list[str]) -> None:
    one = "S-total" if labels is BIES else "B-total"
    rows: list[dict[str, float]] = [{"O": 0.9} for _ in WORDS]
    rows[3], rows[5], rows[7] = {one: 0.3, "O": 0.4}, {one: 0.4, "O": 0.4}, {one: 0.3, "O": 0.4}
    found = best_fields(page_of(WORDS), figures(labels, rows), labels, ["total", "address"], RECEIPTS)
    assert set(found) == {"total"}
    assert (found["total"].value, found["total"].span) == ("7.50", Span("total", 3, 4))
    assert found["total"].confidence == pytest.approx(0.3, rel=1e-3)


def test_a_value_is_cut_out_of_its_words_and_nothing_likely_is_nothing_found() -> None:
    words = ["DATE:01/02/2018", "TOTAL:RM", "7.50"]
    rows = [{"S-date": 0.9}, {"B-total": 0.6, "O": 0.3}, {"E-total": 0.8}]
    found = best_fields(page_of(words), figures(BIES, rows), BIES, ["date", "total"], RECEIPTS)
    assert {name: field.value for name, field in found.items()} == {"date": "01/02/2018", "total": "7.50"}
    nothing = figures(BIES, [{"O": 0.9999} for _ in words])
    assert best_fields(page_of(words), nothing, BIES, ["date", "total"], RECEIPTS) == {}
    assert best_fields(page_of([]), nothing[:0], BIES, ["date", "total"], RECEIPTS) == {}


def test_fields_agree_with_tags_that_are_certain() -> None:
    tags = ["O", "B-date", "O", "B-total", "O", "O", "O", "O"]
    logits = np.full((len(tags), len(BIES)), -10.0, dtype=np.float32)
    logits[np.arange(len(tags)), to_labels(tags, BIES)] = 10.0
    found = best_fields(page_of(WORDS), logits, BIES, ["date", "total"], RECEIPTS)
    assert [field.span for field in found.values()] == spans(tags)


def test_a_company_begins_where_a_line_does() -> None:
    words = ["POPULAR", "BOOK", "CO", "LTD", "12", "ROAD"]
    rows: list[dict[str, float]] = [
        {"O": 0.55, "B-company": 0.3}, {"I-company": 0.4, "B-company": 0.5}, {"I-company": 0.9}, {"E-company": 0.9},
        {"O": 0.9}, {"O": 0.9},
    ]  # fmt: skip
    labels = make_labels(["company"])
    page = page_of(words, [0, 0, 0, 0, 1, 1])
    assert line_edges(page.boxes).tolist() == [True, False, False, False, True, False, True]
    assert (
        best_fields(page, figures(labels, rows), labels, ["company"], RECEIPTS)["company"].value
        == "POPULAR BOOK CO LTD"
    )
    apart = page_of(words, [0, 1, 1, 1, 2, 2])
    assert best_fields(apart, figures(labels, rows), labels, ["company"], RECEIPTS)["company"].value == "BOOK CO LTD"


def test_no_word_belongs_to_two_fields_and_the_surer_one_has_it() -> None:
    labels = make_labels(["company", "address"])
    words = ["ACME", "LTD", "12", "ROAD"]
    rows: list[dict[str, float]] = [
        {"B-company": 0.2, "O": 0.7}, {"E-company": 0.2, "O": 0.7},
        {"B-company": 0.45, "B-address": 0.5}, {"E-company": 0.45, "E-address": 0.5},
    ]  # fmt: skip
    logits, page = figures(labels, rows), page_of(words, [0, 0, 1, 1])
    assert best_fields(page, logits, labels, ["company"], RECEIPTS)["company"].value == "12 ROAD"
    found = best_fields(page, logits, labels, ["company", "address"], RECEIPTS)
    assert {name: field.value for name, field in found.items()} == {"company": "ACME LTD", "address": "12 ROAD"}
    assert list(found) == ["company", "address"]


def test_what_reads_as_no_date_and_no_amount_is_none() -> None:
    words = ["13:30-R", "01/02/2018", "SEVEN", "14", "7.50"]
    rows = [{"S-date": 0.8}, {"S-date": 0.05, "O": 0.9}, {"S-total": 0.9}, {"S-total": 0.6}, {"S-total": 0.1, "O": 0.8}]
    found = best_fields(page_of(words), figures(BIES, rows), BIES, ["date", "total"], RECEIPTS)
    assert {name: field.value for name, field in found.items()} == {"date": "01/02/2018", "total": "7.50"}


def test_what_an_amount_looks_like_weighs_against_the_labels() -> None:
    words = ["0.00", "7.52", "7.50", "7.53"]
    rows: list[dict[str, float]] = [{"S-total": 0.6, "O": 0.3}, *({"S-total": 0.3, "O": 0.6} for _ in words[1:])]
    logits, page = figures(BIES, rows), page_of(words)
    assert best_fields(page, logits, BIES, ["total"], RECEIPTS)["total"].value == "7.50"
    assert best_fields(page, logits, BIES, ["total"], {})["total"].value == "0.00"
