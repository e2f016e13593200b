"""Where on a page a label's text stands, by its letters and digits alone, and BIO tags from that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from engine.documents.rows import Edges, rows
from engine.documents.tags import Span, tags_of
from engine.documents.values import alphanumeric

MAX_LINES = 8
"""A label's text may run over at most this many lines."""

ORDER = ("company", "address", "date", "total")
"""Fields are placed in this order; a later one never takes a word of an earlier one."""


class Place(NamedTuple):
    """Words start..stop-1. `whole` where the text does not begin or end inside a number or a run of letters: "4.10" stands
    in "14.10", but not whole."""

    start: int
    stop: int
    whole: bool


class Line(NamedTuple):
    """A line of text as it was read: its box in any unit, and its words start..stop-1 of the page."""

    box: Edges
    start: int
    stop: int


class Stream:
    """The letters and digits of a page in reading order, and which word each comes from."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words: list[int] = []
        self._inner: list[bool] = []
        """Whether the character goes on with the number or the run of letters of the one before it."""
        text = []
        for index, word in enumerate(words):
            before = ""
            for char in word:
                for plain in alphanumeric(char):
                    text.append(plain)
                    self._words.append(index)
                    self._inner.append(before != "" and before.isdigit() == plain.isdigit())
                    before = plain
                if not char.isalnum():
                    before = ""
        self._inner.append(False)
        self.text = "".join(text)

    def places(self, label: str) -> list[Place]:
        """Every place of the label's text, in reading order; places may overlap."""
        wanted = alphanumeric(label)
        found: list[Place] = []
        at = self.text.find(wanted) if wanted else -1
        while at >= 0:
            end = at + len(wanted)
            whole = not (self._inner[at] or self._inner[end])
            found.append(Place(self._words[at], self._words[end - 1] + 1, whole))
            at = self.text.find(wanted, at + 1)
        return found


def tag_fields(
    words: Sequence[str], lines: Sequence[Line], fields: Mapping[str, str]
) -> tuple[list[str], dict[str, int]]:
    """BIO tags of `words`, and for each field at how many places its text stands (0: a miss).

    A text is looked for by letters and digits over at most `MAX_LINES` lines that follow each other; where it stands whole
    somewhere, only such places count. Which place: the last one on a row that holds "total" but not "sub", "tax" or
    "round" for the total, else its last place; the first place for every other field. Fields are placed in `ORDER`, the
    rest by name; a field whose every place has a word that is taken counts as a miss.
    """
    stream = Stream(words)
    line_of = [number for number, line in enumerate(lines) for _ in range(line.start, line.stop)]
    entities: list[Span] = []
    taken: set[int] = set()
    counts: dict[str, int] = {}
    for name in sorted(fields, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
        places = [
            place
            for place in stream.places(fields[name])
            if line_of[place.stop - 1] - line_of[place.start] < MAX_LINES
            and taken.isdisjoint(range(place.start, place.stop))
        ]
        places = [place for place in places if place.whole] or places
        counts[name] = len(places)
        if places:
            place = _total_place(places, words, lines, line_of) if name == "total" else places[0]
            entities.append(Span(name, place.start, place.stop))
            taken.update(range(place.start, place.stop))
    return tags_of(entities, len(words)), counts


def _total_place(places: list[Place], words: Sequence[str], lines: Sequence[Line], line_of: list[int]) -> Place:
    row_of = {line: number for number, row in enumerate(rows([line.box for line in lines])) for line in row}
    texts: dict[int, str] = {}
    for number, line in enumerate(lines):
        texts[row_of[number]] = texts.get(row_of[number], "") + " ".join(words[line.start : line.stop]).casefold() + " "
    named = [
        place
        for place in places
        if "total" in (text := texts[row_of[line_of[place.start]]])
        and not any(other in text for other in ("sub", "tax", "round"))
    ]
    return (named or places)[-1]
