"""Twin pages that only layout tells apart: the same words in the same order, in other places, and so with other roles.

Whatever reads words and their order alone gives both twins the same answer, and is right on one of them at most; its best
entity F1 is `text_only_ceiling`, 0.5 on twins. Words come in an order that says nothing about their places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from engine.documents.drawing import Sheet
from engine.documents.invented import Split, Values
from engine.documents.layouts import GAP, key_text
from engine.documents.page import Page
from engine.documents.tags import spans
from engine.documents.templates import style

FAMILY = "decisive"


class _Roles(NamedTuple):
    """Two keys and the fields that their values are; the same value twice where only one of them is a field."""

    keys: tuple[str, str]
    fields: tuple[str, str | None]
    kind: Literal["company", "date", "amount"]


_ROLES = (
    _Roles(("Seller", "Buyer"), ("company", "buyer"), "company"),
    _Roles(("Issued", "Due"), ("date", "due_date"), "date"),
    _Roles(("Opening balance", "Closing balance"), ("opening_balance", "closing_balance"), "amount"),
    _Roles(("Subtotal", "Total"), ("subtotal", "total"), "amount"),
    _Roles(("Total", "Cash"), ("total", None), "amount"),
)


def decisive_sheets(split: Split, seed: str, number: int) -> tuple[Sheet, Sheet]:
    """Twins of template `number`: values and drawing order are the same, the two values stand in each other's place."""
    first, second = (Sheet(style(FAMILY, number), f"{seed}-{twin}") for twin in ("a", "b"))
    for sheet, exchanged in ((first, False), (second, True)):
        _draw(sheet, Values(split, f"decisive/{seed}", sheet.style), exchanged)
    return first, second


def _draw(sheet: Sheet, values: Values, exchanged: bool) -> None:
    leading, drawn = sheet.style.leading, values.random
    title = sheet.style.pick("title", ("Summary", "NOTICE", "Overview", "Record"))
    _, y = sheet.put([title], sheet.left, 60, bold=True, scale=1.4)
    for _ in range(drawn.randrange(3)):
        y = sheet.flow([(values.sentence(), None)], sheet.left, y + 4, sheet.right - sheet.left)
    y += leading * drawn.uniform(1, 6)
    roles = drawn.choice(_ROLES)
    sides = [0, 1] if drawn.random() < 0.5 else [1, 0]  # the first side is the left or the upper one
    keys = [key_text(sheet, key) for key in roles.keys]
    places, value_places = _places(sheet, keys, sides, y)
    first = values.random.random() < 0.5
    order = [0, 1] if first else [1, 0]
    drawn_keys = {role: sheet.put([keys[role]], *places[role], bold=True)[0] for role in order}
    texts = _texts(values, roles)
    for text, role in zip(texts, [1, 0] if exchanged else [0, 1], strict=True):
        word, end = sheet.put(
            text if roles.kind == "company" else [text[0]], *value_places[role], field=roles.fields[role]
        )
        sheet.links.append((drawn_keys[role], word))
        y = max(y, end)
    y += 3 * leading
    for _ in range(drawn.randrange(1, 3)):
        y = sheet.flow([(values.sentence(), None)], sheet.left, y + 4, sheet.right - sheet.left)


def _texts(values: Values, roles: _Roles) -> list[list[str]]:
    match roles.kind:
        case "company":
            return [[values.company()], [values.company()]]
        case "date":
            return [[values.written(values.day())], [values.written(values.day())]]
    one = values.amount(values.cents())
    return [[one], [one if None in roles.fields else values.amount(values.cents())]]


def _places(
    sheet: Sheet, keys: Sequence[str], sides: Sequence[int], y: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Where each role's key and value stand: in two columns, or in two rows."""
    leading = sheet.style.leading
    if sheet.style.pick("arrangement", ("columns", "rows")) == "columns":
        xs = [sheet.left + side * (sheet.right - sheet.left) / 2 for side in sides]
        return [(x, y) for x in xs], [(x, y + 1.2 * leading) for x in xs]
    value_x = sheet.left + max(sheet.width(key, bold=True) for key in keys) + 3 * GAP
    ys = [y + side * sheet.style.pick("row distance", (1.0, 1.5, 2.5)) * leading for side in sides]
    return [(sheet.left, row) for row in ys], [(value_x, row) for row in ys]


def text_only_ceiling(pages: Sequence[Page]) -> float:
    """The entity F1 that a reader of words and order alone cannot pass by giving each text the one tagging that is right
    most often among the pages of that text. 1 where no text has two taggings; tagged pages only. Raises `ValueError` for
    a page without tags."""
    taggings: dict[tuple[str, ...], Counter[tuple[str, ...]]] = {}
    for page in pages:
        if page.tags is None:
            raise ValueError(f"page {page.id}: has no tags")
        taggings.setdefault(tuple(page.words), Counter())[tuple(page.tags)] += 1
    hits = predicted = true = 0
    for counts in taggings.values():
        best = spans(counts.most_common(1)[0][0])
        for tags, times in counts.items():
            here = spans(tags)
            hits += times * len(set(best) & set(here))
            predicted += times * len(best)
            true += times * len(here)
    return 2 * hits / (predicted + true) if predicted + true else 1.0
