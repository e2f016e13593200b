"""Normal forms, grading of fields, and the JSON object in a response."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.documents.fields import FieldScore, compare, extract_fields, total
from engine.documents.grading import Reference, grade_document
from engine.documents.values import find_amount, find_date, has_cents, normal, read_amount, read_date, value_in
from engine.scores import Score

MARCH = "2018-03-29"


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("29/03/2018", MARCH), ("29-03-18", MARCH), ("29.3.2018", MARCH), ("2018-03-29", MARCH), ("2018/3/29", MARCH),
        ("20180329", MARCH), ("29032018", MARCH), ("29 MAR 2018", MARCH), ("29MAR2018", MARCH), ("29-Mar-18", MARCH),
        ("Mar 29, 2018", MARCH), ("March 29th 2018", MARCH), ("Thursday, 29 March 2018", MARCH), ("(29/03/2018)", MARCH),
        ("29/03/2018 18:19", MARCH), ("2018-03-29T18:19:20", MARCH), ("DATE: 29/03/2018 6:19 PM", MARCH),
        ("  29 /03/ 2018 ", MARCH), ("2018 March 29", MARCH),
        ("03/29/2018", MARCH),  # no month 29: month first
        ("04/03/2018", "2018-03-04"),  # both orders are dates: day first
        ("01/02/69", "2069-02-01"), ("01/02/70", "1970-02-01"),
        ("31/02/2018", None), ("13/13/2018", None), ("2018", None), ("", None), ("29/03/2018 or 30/03/2018", None),
        ("no. 29/03/2018", None), ("129/03/2018", None), ("29/03/20181", None), ("x" * 90 + "29/03/2018", None),
    ],
)  # fmt: skip
def test_dates(text: str, day: str | None) -> None:
    assert read_date(text) == day


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7.10", "7.1"), ("7.1", "7.1"), ("7", "7"), ("$7.10", "7.1"), ("RM 7.10", "7.1"), ("RM7.10", "7.1"),
        ("7,10 €", "7.1"), ("USD 7.10", "7.1"), ("7.10 MYR", "7.1"), ("1,234.50", "1234.5"), ("1.234,50", "1234.5"),
        ("1 234,50", "1234.5"), ("1'234.50", "1234.5"), ("1,234", "1234"), ("1.234", "1.234"), ("1,234,567", "1234567"),
        ("1.234.567", "1234567"), ("-7.10", "-7.1"), ("7.10-", "-7.1"), ("(7.10)", "-7.1"), ("RM -7.10", "-7.1"),
        (".50", "0.5"), ("0.00", "0"), ("-0.00", "0"), ("007", "7"), ("7. 10", "7.1"), ("100", "100"),
        ("(7.10", None), ("7.10.2", None), ("about 7", None), ("", None), ("RM", None), ("9" * 80, None),
    ],
)  # fmt: skip
def test_amounts(text: str, value: str | None) -> None:
    assert read_amount(text) == value


def test_cents() -> None:
    assert all(has_cents(text) for text in ("7.50", "RM 1,234.50", "12,50 EUR", "7. 50"))
    assert not any(has_cents(text) for text in ("7", "7.5", "1,234", "7.500", "7.50 3"))


def test_values_inside_words() -> None:
    assert find_date("DATE:01/02/2018 TIME:10:22") == "01/02/2018"
    assert find_amount("TOTAL:RM20.50") == "20.50"
    assert find_amount("nothing") is None
    assert find_date("nothing") is None
    for number in ("(306295-X)", " (306295-X)", " (CO. REG. NO: 306295 X).", " (201901000123)"):
        assert value_in("company", f"MYNEWS (M) SB{number}") == "MYNEWS (M) SB"
    for name in ("MR. D.I.Y. (M) SDN BHD", "BOOK TA .K (TAMAN DAYA) SDN BHD", "SHOP (24)", "(306295-X)"):
        assert value_in("company", name) == name
    assert value_in("address", "LOT 5 (81200)") == "LOT 5 (81200)"


def test_names_compare_by_letters_and_digits() -> None:
    assert normal("company", "Mr. D.I.Y. (M) Sdn Bhd") == normal("company", "MR D I Y (M) SDN. BHD.")
    assert normal("company", "MR D I Y") != normal("company", "MR D I V")
    assert normal("due_date", "29/03/2018") == MARCH
    assert normal("total", "see below") == "seebelow"


def test_counts_of_a_page_and_of_many() -> None:
    labels = {"company": "A B", "date": "29/03/2018", "total": "7.10"}
    scores = compare({"Company": "a-b", "total": "7.20", "phone": "1", "date": "?"}, labels)
    assert scores == {
        "company": FieldScore(1, 1, 1), "date": FieldScore(0, 0, 1), "phone": FieldScore(0, 1, 0), "total": FieldScore(0, 1, 1)
    }  # fmt: skip
    page = total(scores.values())
    assert (page.precision, page.recall, page.f1) == (1 / 3, 1 / 3, 1 / 3)
    both = total([page, FieldScore(4, 4, 4)])
    assert both == FieldScore(5, 7, 7)
    assert total([]).f1 == total([]).precision == total([]).recall == 1.0
    assert FieldScore(0, 0, 3).f1 == FieldScore(0, 0, 3).precision == FieldScore(0, 3, 0).recall == 0.0


name = st.sampled_from(["company", "date", "due_date", "address", "total", "tax", "note"])
labels = st.dictionaries(name, st.text(max_size=70) | st.dates().map(str) | st.decimals(0, 9999, places=2).map(str))


def graded(text: str, labels: dict[str, str]) -> Score:
    """A response held against the labels of a page on which nothing else is asked for."""
    return grade_document(
        text, Reference(id="a", wanted=list(labels), labels=labels, missed=0, words=[], boxes=[]), None
    )


@settings(deadline=None)
@given(labels, st.randoms())
def test_labels_graded_by_themselves_are_perfect_in_any_order_and_spacing(labels: dict[str, str], random) -> None:
    spaced = {key.upper(): f"  {value} \n" for key, value in labels.items()}
    items = list(spaced.items())
    random.shuffle(items)
    for predicted in (labels, dict(items)):
        assert total(compare(predicted, labels).values()).f1 == 1.0
    answer = json.dumps(dict(items), indent=random.choice([None, 2]))
    result = graded(f"Here it is:\n```json\n{answer}\n```\n", labels)
    assert (result.correct, result.reward) == (True, 1.0)


@settings(deadline=None)
@given(labels, name, st.sampled_from(["zzz", "2001-01-01", "31415.92"]))
def test_one_wrong_field_is_never_perfect(labels: dict[str, str], field: str, wrong: str) -> None:
    if normal(field, labels.get(field, "")) != normal(field, wrong):
        assert total(compare({**labels, field: wrong}, labels).values()).f1 < 1.0


text_like_json = st.text(alphabet='{}[]",:\\ \n`1aé-.eE', max_size=200)


@settings(max_examples=300, deadline=None)
@given(st.text() | text_like_json | st.recursive(st.none() | st.floats() | st.integers() | st.text(max_size=9),
       lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)).map(json.dumps))  # fmt: skip
def test_garbage_gives_fields_or_none_and_never_raises(text: str) -> None:
    fields = extract_fields(text)
    assert all(isinstance(value, str) and value.strip() == value != "" for value in fields.values())
    graded(text, {"total": "1"})


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('{"total": "7.10"}', {"total": "7.10"}),
        ('I think {braces} help.\n```json\n{"total": "7.10"}\n```\nDone.', {"total": "7.10"}),
        ('{"total": "1"} no, wait: {"total": "2"} ok?', {"total": "2"}),
        ('{"total": "1"} and then {"total": "2"', {"total": "1"}),
        ('{"total": "2", "more": {"total": "3"}}', {"total": "2"}),
        ('{ "total": 7.10, "tax": 3, "paid": true, "date": null, "company": " "}', {"total": "7.1", "tax": "3"}),
        ('{"address": ["1 Road", 81200, "Town"]}', {"address": "1 Road 81200 Town"}),
        ('{"address": "1 Road\nTown"}', {"address": "1 Road\nTown"}),
        ('{"total": "1", "total": "2"}', {"total": "2"}),
        ('{"note": "a } and { b", "total": "2"}', {"note": "a } and { b", "total": "2"}),
        ('["total", "7.10"]', {}),
        ("{'total': '7.10'}", {}),
        ("no object", {}),
        ("", {}),
        ('{"total": ' + "9" * 5000 + "}", {}),
        ('{"a":' * 3000, {}),
        ('{"total": "1"} {"a": ' + "[" * 90_000, {"total": "1"}),
        ('{"total": "1"} {}', {}),
    ],
)
def test_which_object_counts(text: str, fields: dict[str, str]) -> None:
    assert extract_fields(text) == fields


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, '{"' * 200_000, "{ " * 200_000, '{"a": "' + "{" * 200_000, "1," * 300_000]
)
def test_a_hostile_response_costs_little(text: str) -> None:
    start = time.monotonic()
    extract_fields(text)
    for field in ("date", "total"):
        normal(field, text)
    assert time.monotonic() - start < 3.0
