"""Pages as the encoder takes them: sub-tokens with their word's box, in rows of a limited length.

A row is [CLS], the sub-tokens of consecutive words, [SEP]. A page that needs more than one row is read through windows;
nothing is left out but what a single word has beyond a whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.utel.config import SIZE
from engine.utel.wordpiece import WordPiece

CLS_BOX, SEP_BOX, PAD_BOX = (0, 0, 0, 0), (SIZE,) * 4, (0, 0, 0, 0)
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class EncodedPage:
    """W words: word w is `tokens`[starts[w]:starts[w + 1]] (never empty) at `boxes`[w] = (x0, y0, x1, y1). All int64."""

    id: str
    tokens: np.ndarray
    starts: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def first_tokens(self) -> np.ndarray:
        """[W]"""
        return self.tokens[self.starts[:-1]]


def cover(page: EncodedPage, words: np.ndarray, mask: int) -> EncodedPage:
    """The page with all sub-tokens of `words` (bool [W]) replaced by `mask`."""
    covered = np.repeat(words, np.diff(page.starts))
    return EncodedPage(page.id, np.where(covered, mask, page.tokens), page.starts, page.boxes)


@dataclass(frozen=True)
class Window:
    """Words first..stop - 1 of a page. `limit` is how many sub-tokens a window holds; only a word that is longer by itself is
    cut to it."""

    page: EncodedPage
    first: int
    stop: int
    limit: int

    def __len__(self) -> int:
        return self.stop - self.first

    @property
    def starts(self) -> np.ndarray:
        """[words + 1]: where in the row each word begins ([CLS] is at 0), and where [SEP] is."""
        starts = self.page.starts[self.first : self.stop + 1]
        return np.minimum(starts - starts[0], self.limit) + 1

    @property
    def length(self) -> int:
        """Of the row."""
        return int(self.starts[-1]) + 1

    @property
    def boxes(self) -> np.ndarray:
        """[words, 4]"""
        return self.page.boxes[self.first : self.stop]


@dataclass(frozen=True)
class Row:
    """One input: `ids` [N], `boxes` [N, 4], `word` [N] (the window's word of each place; -1 for [CLS] and [SEP])."""

    ids: np.ndarray
    boxes: np.ndarray
    word: np.ndarray


@dataclass(frozen=True)
class Inputs:
    """Rows of a batch, padded: what `Utel.forward` takes."""

    ids: Tensor
    boxes: Tensor
    mask: Tensor


def encode_page(pieces: WordPiece, words: Sequence[str], boxes: Sequence[Box], *, id: str = "") -> EncodedPage:
    """`boxes` in thousandths of the page, one a word, cut to 0..1000. Raises ValueError when they are not one a word."""
    if len(words) != len(boxes):
        raise ValueError(f"page {id!r}: got {len(boxes)} boxes, expected one for each of the {len(words)} words")
    tokens, starts = pieces.encode_words(words)
    edges = np.array(boxes, dtype=np.int64).reshape(-1, 4)
    return EncodedPage(id, tokens, starts, edges.clip(0, SIZE))


def windows(page: EncodedPage, length: int, *, overlap: int = 0) -> list[Window]:
    """Windows of whole words, in rows of at most `length` with [CLS] and [SEP], that cover the page from its first word to
    its last. Each goes beyond the one before, with which it shares words of at most `overlap` sub-tokens. A page
    without words has none. Raises ValueError for a length below 3 and for an overlap that fills a window."""
    limit = length - 2
    if limit < 1:
        raise ValueError(f"length: got {length}, expected at least 3: [CLS], a sub-token, [SEP]")
    if not 0 <= overlap < limit:
        raise ValueError(f"overlap: got {overlap}, expected 0 to {limit - 1}")
    found: list[Window] = []
    first, ends = 0, page.starts[1:]
    while first < len(page):
        stop = int(np.searchsorted(ends, page.starts[first] + limit, side="right"))
        stop = max(stop, first + 1)
        found.append(Window(page, first, stop, limit))
        if stop == len(page):
            break
        # The next window goes on with word `stop`, so what it repeats must leave room for that word.
        begin = max(page.starts[stop] - overlap, page.starts[stop + 1] - limit)
        first = min(stop, int(np.searchsorted(page.starts, begin, side="left")))
    return found


def lay_out(window: Window, pieces: WordPiece) -> Row:
    """The row of a window."""
    starts, page = window.starts, window.page
    lengths = np.diff(starts)
    word = np.concatenate([[-1], np.repeat(np.arange(len(window)), lengths), [-1]])
    begin = page.starts[window.first]
    ids = np.concatenate([[pieces.cls], page.tokens[begin : begin + lengths.sum()], [pieces.sep]])
    boxes = np.concatenate([[CLS_BOX], np.repeat(window.boxes, lengths, axis=0), [SEP_BOX]])
    return Row(ids, boxes, word)


def stack(rows: Sequence[Row], pieces: WordPiece, device: torch.device | str = "cpu") -> Inputs:
    """The rows as one batch [B, L], L that of the longest."""
    shape = (len(rows), max((len(row.ids) for row in rows), default=0))
    ids = np.full(shape, pieces.pad, dtype=np.int64)
    boxes = np.full((*shape, 4), PAD_BOX, dtype=np.int64)
    mask = np.zeros(shape, dtype=bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)], boxes[index, : len(row.ids)], mask[index, : len(row.ids)] = row.ids, row.boxes, True
    return Inputs(*(torch.from_numpy(array).to(device) for array in (ids, boxes, mask)))
