"""A page as the text of a prompt, with where its words stand, and the question for its fields."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.documents.page import Page
from engine.documents.rows import rows

WIDE_GAP = 1.5
"""A gap wider than this many of the neighbouring words' mean characters begins a new segment (a space is about 1 or less)."""

_ASK = """Extract these fields from the document below: {fields}.
Answer with one JSON object that maps field names to texts as they stand in the document. Leave out a field that the document \
does not have.
Each line is a row of the document: its height on the page (0 top, 1000 bottom), then its texts, each after @ and its distance \
from the left edge (0 to 1000).

"""


def page_text(page: Page, *, positions: bool = True) -> list[str]:
    """The page's rows, from top to bottom: "233 @338 UNIHAKKA INTERNATIONAL SDN BHD @700 7.10" is a row whose top is at 233
    with two texts, at 338 and at 700. Without `positions` the words alone."""
    texts = []
    for row in rows(page.boxes):
        if not positions:
            texts.append(" ".join(page.words[index] for index in row))
            continue
        parts = [str(min(page.boxes[index][1] for index in row))]
        for place, index in enumerate(row):
            if place == 0 or _apart(page, row[place - 1], index):
                parts.append(f"@{page.boxes[index][0]}")
            parts.append(page.words[index])
        texts.append(" ".join(parts))
    return texts


def extraction_prompt(
    page: Page,
    fields: Sequence[str],
    *,
    max_characters: int,
    question: str | None = None,
    positions: bool = True,
    first_words: int | None = None,
) -> str:
    """The whole prompt, of at most `max_characters`: the question (the full one, or `question` with the names in place of
    "{fields}") and the page's rows after it, or in place of "{page}"; the first rows that hold at most `first_words` words
    (at least one). Of a page that
    does not fit the first and last rows stay, in turn as far as they fit, and one line in the middle says how many were left
    out. Raises `ValueError` where not even the question fits."""
    asked = (_ASK if question is None else question).replace("{fields}", ", ".join(fields))
    texts = page_text(page, positions=positions)
    if first_words is not None:
        counts = np.cumsum([len(row) for row in rows(page.boxes)])
        texts = texts[: max(1, int(np.searchsorted(counts, first_words, side="right")))]
    room = max_characters - len(asked)
    if room < len(_left_out(len(texts))):
        raise ValueError(
            f"max_characters: got {max_characters}, expected at least {len(asked) + len(_left_out(len(texts)))}, "
            f"which the question for {len(fields)} fields needs before any row of the page"
        )
    before, _, behind = asked.partition("{page}")
    return before + "\n".join(_fitted(texts, room)) + behind


def _apart(page: Page, left: int, right: int) -> bool:
    """Whether two neighbours of a row are parted by more than a space."""
    widths = [(page.boxes[index][2] - page.boxes[index][0]) / len(page.words[index]) for index in (left, right)]
    return page.boxes[right][0] - page.boxes[left][2] > WIDE_GAP * max(sum(widths) / 2, 1.0)


def _left_out(count: int) -> str:
    return f"[{count} rows left out]"


def _fitted(texts: list[str], room: int) -> list[str]:
    """Rows that take at most `room` characters, line breaks between them included."""
    if sum(map(len, texts)) + len(texts) - 1 <= room:
        return texts
    room -= len(_left_out(len(texts)))
    head, tail = 0, len(texts)
    while head < tail:
        from_head = head <= len(texts) - tail
        cost = len(texts[head] if from_head else texts[tail - 1]) + 1
        if cost > room:
            break
        room -= cost
        head, tail = (head + 1, tail) if from_head else (head, tail - 1)
    return [*texts[:head], _left_out(tail - head), *texts[tail:]]
