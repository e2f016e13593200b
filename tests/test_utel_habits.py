"""Where and how fields are written, learnt from labels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.documents.page import Page
from engine.utel.habits import Habits, learn_habits


def page(words: list[str], lines: list[int]) -> Page:
    boxes = [(10 * place, 20 * line, 10 * place + 9, 20 * line + 9) for place, line in enumerate(lines)]
    return Page(id="p", words=words, boxes=boxes)


RECEIPT = (
    page(["ACME", "LTD", "2", "TEA", "0.00", "3.17", "-1.10", "TOTAL", "7.50"], [0, 0, 1, 1, 1, 1, 1, 2, 2]),
    ["B-company", "I-company", "O", "O", "O", "O", "O", "O", "B-total"],
)


def odds(times: int, otherwise: int) -> float:
    return math.log((times + 0.5) / (otherwise + 0.5))


def test_costs_are_log_odds_of_the_labels_over_those_of_other_amounts() -> None:
    found = learn_habits([RECEIPT] * 20)
    always, company, total = odds(20, 0), found["company"], found["total"]
    assert (company.begins, company.ends) == pytest.approx((always, always), abs=0.01)
    assert (company.no_cents, company.not_positive, company.odd_cents) == (0, 0, 0)
    assert (total.begins, total.ends) == pytest.approx((0, always), abs=0.01)
    # the other amounts: 2 is an integer; of 0.00, 3.17 and -1.10 two are not positive and one is odd
    assert total.no_cents == pytest.approx(always - odds(60, 20), abs=0.01)
    assert total.not_positive == pytest.approx(always - odds(20, 40), abs=0.01)
    assert total.odd_cents == pytest.approx(always - odds(40, 20), abs=0.01)


def test_what_costs_nothing() -> None:
    assert learn_habits([]) == {}
    found = learn_habits([(page(["PAID", "9.99", "CASH", "10.00"], [0, 0, 0, 0]), ["O", "B-total", "O", "O"])] * 9)
    assert found == {"total": Habits()}, "what fewer labels than other amounts have is no habit"


def test_the_cost_of_a_span_and_of_an_amount() -> None:
    habits = Habits(begins=3.0, ends=1.0, no_cents=6.0, not_positive=4.0, odd_cents=1.5)
    sides = np.array([[True, True], [False, True], [True, False], [False, False]])
    assert habits.cost(sides[:, 0], sides[:, 1]).tolist() == [0, 3, 1, 4]
    amounts = {"7.50": "7.5", "7.52": "7.52", "0.00": "0", "-0.02": "-0.02", "7": "7", "1e9": "1e9"}
    costs = {text: habits.amount_cost(text, form) for text, form in amounts.items()}
    assert costs == {"7.50": 0, "7.52": 1.5, "0.00": 4, "-0.02": 5.5, "7": 6, "1e9": 6}
    assert habits.amount_cost(f"{'9' * 60}.01", f"{'9' * 60}.01") <= 1.5, "no number is too long"
