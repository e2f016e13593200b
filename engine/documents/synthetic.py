"""Synthetic pages with exact labels. Every figure measured on them is to be called synthetic.

A page is a function of (split, seed, index). Splits differ in their values (`invented.Values`), and test pages also come
from templates, and one whole family, that neither train nor dev ever draws: a model that has learnt the templates by heart
gains nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from engine.documents.decisive import FAMILY, decisive_sheets
from engine.documents.drawing import Sheet, read_back
from engine.documents.invented import Split, Values
from engine.documents.noise import CLEAN, Noise, add_noise
from engine.documents.page import Page
from engine.documents.templates import FAMILIES, style

TEMPLATES = 16
"""Templates a family."""
HELD_OUT_FAMILY = "statement"
_BATCH = 64


def held_out(family: str, number: int) -> bool:
    """Whether only test draws this template: one in four, and all of `HELD_OUT_FAMILY`."""
    return family == HELD_OUT_FAMILY or number % 4 == 3


def templates(split: Split) -> list[tuple[str, int]]:
    """(family, number) of every template that a split draws."""
    return [
        (family, number)
        for family in FAMILIES
        for number in range(TEMPLATES)
        if held_out(family, number) == (split == "test")
    ]


def synthesize(
    split: Split, count: int, *, seed: int = 0, noise: Noise = CLEAN, decisive: float = 0.0
) -> Iterator[Page]:
    """`count` pages with words, boxes, tags, fields and links, read from PDFs that are drawn in memory.

    `decisive` is the part of pages that come as layout-decisive twins (`decisive.decisive_sheets`), two next to each other.
    Noise changes words and boxes, never `fields`. Raises `ValueError` for settings out of range, and `SynthesisError` where
    a page does not read as it was drawn.
    """
    if not 0 <= decisive <= 1:
        raise ValueError(f"decisive: got {decisive}, expected 0 to 1")
    if count < 0:
        raise ValueError(f"count: got {count}, expected at least 0")
    twins = round(decisive * count / 2)
    kinds = [True] * min(twins, count // 2)
    kinds += [False] * (count - 2 * len(kinds))
    random.Random(f"{split}/{seed}").shuffle(kinds)
    sheets: list[Sheet] = []
    for index, twin in enumerate(kinds):
        name = _name(split, seed, index)
        sheets += _twins(split, name) if twin else [_sheet(split, name)]
        if len(sheets) >= _BATCH or index + 1 == len(kinds):
            for sheet, page in zip(sheets, read_back(sheets), strict=True):
                yield add_noise(page, noise, f"{seed}/{_pair(sheet)}")
            sheets = []


def synthetic_page(split: Split, index: int, *, seed: int = 0, noise: Noise = CLEAN) -> Page:
    """The page at `index` of `synthesize` without twins, by itself."""
    sheet = _sheet(split, _name(split, seed, index))
    return add_noise(read_back([sheet])[0], noise, f"{seed}/{_pair(sheet)}")


def _name(split: Split, seed: int, index: int) -> str:
    return f"{split}-{seed}-{index:06d}"


def _sheet(split: Split, name: str) -> Sheet:
    drawn = random.Random(name)
    choice = templates(split)
    family = drawn.choice(sorted({family for family, _ in choice}))
    number = drawn.choice([number for its, number in choice if its == family])
    sheet = Sheet(style(family, number), name)
    FAMILIES[family](sheet, Values(split, name, sheet.style))
    return sheet


def _twins(split: Split, name: str) -> tuple[Sheet, Sheet]:
    numbers = [number for number in range(TEMPLATES) if held_out(FAMILY, number) == (split == "test")]
    return decisive_sheets(split, name, random.Random(name).choice(numbers))


def _pair(sheet: Sheet) -> str:
    """Twins get the same noise, or it would tell them apart."""
    return sheet.name[:-2] if sheet.style.family == FAMILY else sheet.name
