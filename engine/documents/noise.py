"""Noise on pages: boxes that are a little off, misread characters, words that were not found, another reading order."""

from __future__ import annotations

import random

import msgspec
from msgspec import Struct

from engine.documents.page import SIZE, Box, Page
from engine.documents.tags import Span, spans, tags_of

_MISREAD = {"0": "O", "O": "0", "1": "l", "l": "1", "I": "1", "5": "S", "S": "5", "8": "B", "B": "8", "2": "Z", "6": "G", "e": "c",
            "c": "e", "u": "v", "m": "rn", "n": "r", "a": "o", "o": "a", ".": ",", ",": "."}  # fmt: skip


class Noise(Struct, frozen=True):
    """`jitter`: each edge of a box moves by up to this part of the page. `swaps`: probability that a character is read as one
    that looks like it (one without such a twin changes places with the next). `drops`: probability that a word is not
    there. `shuffle`: entities and the rows of words between them come in any order, each whole."""

    jitter: float = 0.005
    swaps: float = 0.01
    drops: float = 0.01
    shuffle: bool = False

    def __post_init__(self) -> None:
        for name in ("jitter", "swaps", "drops"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"noise.{name}: got {getattr(self, name)}, expected 0 to 1")


CLEAN = Noise(jitter=0.0, swaps=0.0, drops=0.0)


def add_noise(page: Page, noise: Noise, seed: str) -> Page:
    """The page with noise: a function of the page's words, the noise and the seed. `fields` stay: they are what the document
    says, whether or not it can still be read. Of an entity that loses words the rest is the entity."""
    if noise == CLEAN:
        return page
    drawn = random.Random(seed)
    words = [_misread(word, noise.swaps, drawn) for word in page.words]
    boxes = [_moved(box, noise.jitter, drawn) for box in page.boxes]
    kept = [index for index in range(len(words)) if drawn.random() >= noise.drops]
    if noise.shuffle:
        kept = _shuffled(page, kept, drawn)
    place = {index: at for at, index in enumerate(kept)}
    tags = None
    if page.tags is not None:
        left = [[place[index] for index in range(span.start, span.stop) if index in place] for span in spans(page.tags)]
        types = [span.type for span in spans(page.tags)]
        entities = (Span(type_, at[0], at[-1] + 1) for type_, at in zip(types, left, strict=True) if at)
        tags = tags_of(entities, len(kept))
    return msgspec.structs.replace(
        page,
        words=[words[index] for index in kept],
        boxes=[boxes[index] for index in kept],
        tags=tags,
        links=[(place[key], place[value]) for key, value in page.links if key in place and value in place],
    )


def _misread(word: str, probability: float, drawn: random.Random) -> str:
    chars = list(word)
    for at in range(len(chars)):
        if drawn.random() < probability:
            if chars[at] in _MISREAD:
                chars[at] = _MISREAD[chars[at]]
            elif at + 1 < len(chars):
                chars[at], chars[at + 1] = chars[at + 1], chars[at]
    return "".join(chars)


def _moved(box: Box, jitter: float, drawn: random.Random) -> Box:
    x0, y0, x1, y1 = (min(max(round(edge + drawn.uniform(-jitter, jitter) * SIZE), 0), SIZE) for edge in box)
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _shuffled(page: Page, kept: list[int], drawn: random.Random) -> list[int]:
    """Pieces in any order; a piece is an entity, or words of no entity that stand next to each other on a row."""
    entity = {
        index: number for number, span in enumerate(spans(page.tags or [])) for index in range(span.start, span.stop)
    }
    pieces: list[list[int]] = []
    for index in kept:
        last = pieces[-1][-1] if pieces else None
        same = last is not None and entity.get(index) == entity.get(last)
        if (
            last is not None
            and same
            and (index in entity or page.boxes[index][1] <= page.boxes[last][3] <= page.boxes[index][3] + 5)
        ):
            pieces[-1].append(index)
        else:
            pieces.append([index])
    drawn.shuffle(pieces)
    return [index for piece in pieces for index in piece]
