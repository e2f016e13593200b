"""Where and how a field is written on the pages that a tagger is trained on, from their labels: what it costs a span to differ.

Costs are in nats and never below 0, each the log-odds that the field is as usual: over those of it being otherwise (places in
a line), or over those of the page's other amounts (what an amount looks like). Counts begin at one half.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from decimal import Decimal

import numpy as np
from msgspec import Struct

from engine.documents.page import Box, Page
from engine.documents.page_rows import ReadPage
from engine.documents.tags import spans
from engine.documents.values import has_cents, kind_of, read_amount, value_in


class Habits(Struct, frozen=True, forbid_unknown_fields=True):
    """Of one field: what it costs its span to begin and to end inside a line of text, and an amount to have no two decimals,
    to be 0 or less, and to be no multiple of five cents (where the smallest coin is one of five, totals are)."""

    begins: float = 0.0
    ends: float = 0.0
    no_cents: float = 0.0
    not_positive: float = 0.0
    odd_cents: float = 0.0

    def cost(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Of spans: whether they begin and end where a line does, bool [spans] each."""
        return self.begins * ~begins + self.ends * ~ends

    def amount_cost(self, text: str, form: str) -> float:
        """Of an amount's text and its normal form."""
        return sum(getattr(self, name) for name, there in _traits(text, form) if there)


def learn_habits(pages: Iterable[tuple[Page | ReadPage, Sequence[str]]]) -> dict[str, Habits]:
    """By field, of pages with a BIO tag a word."""
    usual: defaultdict[str, Counter[tuple[str, bool]]] = defaultdict(Counter)
    others: defaultdict[str, Counter[tuple[str, bool]]] = defaultdict(Counter)
    for page, tags in pages:
        edges = line_edges(page.boxes)
        amounts = [(word, form) for word in page.words if (form := read_amount(word)) is not None]
        for field, start, stop in spans(tags):
            seen = usual[field]
            seen["begins", bool(edges[start])] += 1
            seen["ends", bool(edges[stop])] += 1
            text = value_in(field, " ".join(page.words[start:stop]))
            if kind_of(field) != "amount" or (form := read_amount(text)) is None:
                continue
            seen.update(_traits(text, form))
            for word, other in amounts:
                if other != form:
                    others[field].update(_traits(word, other))
    return {field: _habits(seen, others[field]) for field, seen in sorted(usual.items())}


def line_edges(boxes: Sequence[Box]) -> np.ndarray:
    """bool [words + 1]: whether a line of text begins with the word, or ends before it. Words go on with a line when they are
    exactly as high and further right."""
    inner = [
        (left[1], left[3]) == (right[1], right[3]) and left[0] <= right[0] for left, right in itertools.pairwise(boxes)
    ]
    return ~np.array([False, *inner, False])


_TRAITS = ("no_cents", "not_positive", "odd_cents")


def _traits(text: str, form: str) -> list[tuple[str, bool]]:
    """Whether an amount has each of `_TRAITS`; an integer (a count, a year) is asked no more."""
    if not has_cents(text):
        return [("no_cents", True)]
    value = Decimal(form)
    odd = 20 * value != (20 * value).to_integral_value()
    return [("no_cents", False), ("not_positive", value <= 0), ("odd_cents", odd)]


def _habits(seen: Counter[tuple[str, bool]], others: Counter[tuple[str, bool]]) -> Habits:
    costs = {name: _odds(seen[name, True], seen[name, False]) for name in ("begins", "ends")}
    costs |= {
        name: _odds(seen[name, False], seen[name, True]) - _odds(others[name, False], others[name, True])
        for name in _TRAITS
    }
    return Habits(**{name: round(max(0.0, cost), 2) for name, cost in costs.items()})


def _odds(times: int, otherwise: int) -> float:
    return math.log((times + 0.5) / (otherwise + 0.5))
