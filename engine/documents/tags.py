"""BIO tags: "O" outside, "B-total" the first word of an entity, "I-total" each further one. The hyphen is seqeval's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Words start..stop-1 are one entity."""

    type: str
    start: int
    stop: int


def tag_fault(tags: Sequence[str]) -> str | None:
    """What is wrong with the first tag that is not BIO, or that goes on with an entity that did not begin."""
    previous = "O"
    for index, tag in enumerate(tags):
        prefix, hyphen, type_ = tag.partition("-")
        if tag != "O" and not (prefix in ("B", "I") and hyphen and type_):
            return f"tags[{index}]: got {tag!r}, expected 'O', 'B-TYPE' or 'I-TYPE'"
        if prefix == "I" and previous.partition("-")[2] != type_:
            return f"tags[{index}]: got {tag!r} after {previous!r}, expected 'B-{type_}' where an entity begins"
        previous = tag
    return None


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities, in order. A stray "I-x" (a model's) begins an entity, as in conlleval and in seqeval's default."""
    found: list[Span] = []
    for index, tag in enumerate(tags):
        prefix, _, type_ = tag.partition("-")
        if prefix == "I" and found and found[-1].type == type_ and found[-1].stop == index:
            found[-1] = Span(type_, found[-1].start, index + 1)
        elif prefix in ("B", "I"):
            found.append(Span(type_, index, index + 1))
    return found


def tags_of(entities: Iterable[Span], length: int) -> list[str]:
    """The tags of `length` words. Raises `ValueError` where two entities share a word."""
    tags = ["O"] * length
    for type_, start, stop in entities:
        for index in range(start, stop):
            if tags[index] != "O":
                raise ValueError(f"word {index}: is in an entity {type_!r} and is tagged {tags[index]!r} already")
            tags[index] = f"{'B' if index == start else 'I'}-{type_}"
    return tags
