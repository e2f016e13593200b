"""Pieces that the templates lay out: keys with values, grids of them, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.documents.drawing import Align, Sheet

GAP = 8.0
"""Points between neighbours that are not one text."""


class Entry(NamedTuple):
    """A key and its value; `field` is None for what is no field (a distractor), `value` is empty where nothing is filled in."""

    key: str
    value: str
    field: str | None = None


class Column(NamedTuple):
    """`edge` is where its texts end or begin, by `align`; `width` is what they are wrapped to."""

    title: str
    edge: float
    width: float
    align: Align = "left"


def key_text(sheet: Sheet, key: str) -> str:
    style = sheet.style
    return f"{key.upper() if style.capitals else key}{style.colon}"


def pair(sheet: Sheet, entry: Entry, x: float, y: float, width: float, *, value_x: float | None = None) -> float:
    """A key with its value beside or below it, as the template has it, linked. Returns the next line's `y`."""
    key = key_text(sheet, entry.key)
    bold = sheet.style.pick("bold keys", (True, False))
    first, below = sheet.put(sheet.wrap(key, width, bold=bold), x, y, bold=bold)
    place, start_y = max(value_x or 0.0, x + sheet.width(key, bold=bold) + GAP), y
    widest = max((sheet.width(word) for word in entry.value.split()), default=0.0)
    if sheet.style.stacked or place + widest > x + width:  # no room beside the key
        place, start_y = x, below
    if not entry.value:
        return max(below, start_y + sheet.style.leading)
    lines = sheet.wrap(entry.value, x + width - place)
    value, end = sheet.put(lines, place, start_y, field=entry.field)
    sheet.links.append((first, value))
    return max(below, end)


def pairs(sheet: Sheet, entries: Sequence[Entry], x: float, y: float, width: float) -> float:
    """Pairs below each other, values in a column of their own where the template lines them up."""
    bold = sheet.style.pick("bold keys", (True, False))
    keys = max((sheet.width(key_text(sheet, entry.key), bold=bold) for entry in entries), default=0.0)
    value_x = x + keys + GAP if sheet.style.pick("line up values", (True, True, False)) else None
    gap = sheet.style.pick("pair gap", (0.0, 3.0, 6.0))
    for entry in entries:
        y = pair(sheet, entry, x, y, width, value_x=value_x) + gap
    return y


def grid(sheet: Sheet, entries: Sequence[Entry], y: float, columns: int) -> float:
    """Pairs in rows of `columns`."""
    width = (sheet.right - sheet.left) / columns
    for start in range(0, len(entries), columns):
        row = entries[start : start + columns]
        ends = [pair(sheet, entry, sheet.left + at * width, y, width - 2 * GAP) for at, entry in enumerate(row)]
        y = max(ends) + sheet.style.pick("row gap", (4.0, 8.0, 12.0))
        if sheet.style.rules:
            sheet.rule(y - sheet.style.leading)
            y += 4
    return y


def block(
    sheet: Sheet, title: str, texts: Sequence[tuple[Sequence[str], str | None]], x: float, y: float, *, width: float
) -> float:
    """A title (none when empty) with texts below it, wrapped; the first text is the title's value."""
    key = sheet.put([key_text(sheet, title)], x, y, bold=True) if title else None
    y = y if key is None else key[1]
    for place, (lines, field) in enumerate(texts):
        first, y = sheet.put([part for line in lines for part in sheet.wrap(line, width)], x, y, field=field)
        if key is not None and place == 0:
            sheet.links.append((key[0], first))
    return y


def table(sheet: Sheet, columns: Sequence[Column], rows: Sequence[Sequence[str]], y: float) -> float:
    """Titles and rows, cell by cell from left to right; cells wrap."""
    if sheet.style.rules:
        sheet.rule(y - sheet.style.leading)
    for column in columns:
        title = key_text(sheet, column.title).rstrip(" :")
        _, below = sheet.put([title], column.edge, y, bold=True, align=column.align)
    y = below
    if sheet.style.rules:
        sheet.rule(y - sheet.style.leading + 3)
        y += 4
    for row in rows:
        ends = [
            sheet.put(sheet.wrap(cell, column.width), column.edge, y, align=column.align)[1]
            for column, cell in zip(columns, row, strict=True)
            if cell
        ]
        y = max(ends)
    if sheet.style.rules:
        sheet.rule(y - sheet.style.leading + 3)
    return y + 4


def sums(sheet: Sheet, entries: Sequence[Entry], y: float, *, key_x: float, value_x: float) -> float:
    """Keys with amounts that end at `value_x`, always side by side."""
    strong = sheet.style.pick("bold sums", (True, False))
    for entry in entries:
        bold = strong and entry.field == "total"
        key, _ = sheet.put([key_text(sheet, entry.key)], key_x, y, bold=bold)
        value, y = sheet.put([entry.value], value_x, y, field=entry.field, bold=bold, align="right")
        sheet.links.append((key, value))
    return y
