"""Several pages on one sheet, as receipts are glued to an expense claim: real words at natural distances, and as many of them
as long rows need."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from engine.documents.page import Box, Page


def join(pages: Sequence[Page]) -> Page:
    """The pages side by side, in rows of about as many as there are rows, read one after the other.

    Each takes an equal part of the sheet. Tags stay (None where a page has none), links too; `fields` do not, as each page
    has its own total. The id is the first page's and how many there are. Raises `ValueError` for no pages.
    """
    if not pages:
        raise ValueError("pages: got none, expected at least one")
    down = math.isqrt(len(pages))
    across = -(-len(pages) // down)
    firsts = [0]
    for page in pages[:-1]:
        firsts.append(firsts[-1] + len(page.words))
    tagged = [page.tags for page in pages if page.tags is not None]
    return Page(
        id=f"{pages[0].id}+{len(pages) - 1}",
        words=[word for page in pages for word in page.words],
        boxes=[
            _placed(box, place % across, across, place // across, down)
            for place, page in enumerate(pages)
            for box in page.boxes
        ],
        tags=[tag for tags in tagged for tag in tags] if len(tagged) == len(pages) else None,
        links=[(a + first, b + first) for page, first in zip(pages, firsts, strict=True) for a, b in page.links],
        family="sheet",
    )


def joined(pages: Sequence[Page], count: int) -> Iterator[Page]:
    """Sheets of `count` pages each, in the pages' order; the last may have fewer. The pages themselves where that is 1."""
    for first in range(0, len(pages), count):
        some = pages[first : first + count]
        yield some[0] if count == 1 else join(some)


def _placed(box: Box, column: int, across: int, row: int, down: int) -> Box:
    x0, y0, x1, y1 = box
    left, top = 1000 * column, 1000 * row
    return (left + x0) // across, (top + y0) // down, (left + x1) // across, (top + y1) // down
