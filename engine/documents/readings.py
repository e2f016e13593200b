"""What the reading of a data set met, in words: each importer counts in a report of its own, and this says what it counted."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

NAMED = 5
"""So many refused files are named."""


def counts(report: Struct) -> dict[str, int]:
    """The counts of a report that are not zero, by name; those by field (or by file) as their sum (or number)."""
    found: dict[str, int] = {}
    for name in report.__struct_fields__:
        value = getattr(report, name)
        if isinstance(value, dict):
            value = sum(number if isinstance(number, int) else 1 for number in value.values())
        if value:
            found[name] = int(value)
    return found


def in_words(report: Struct) -> str:
    """One line: "pages 3, words 120, ..."."""
    found = counts(report)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items()) or "nothing read"


def refusals(refused: Mapping[str, str]) -> list[str]:
    """A line for each of the first files that were refused, with the reason, and one for the rest."""
    lines = list(refused.values())
    more = len(lines) - NAMED
    return lines if more <= 0 else [*lines[:NAMED], f"and {more} more files"]


class Reading(Struct, frozen=True):
    """A data set and what its reading met, as lines."""

    source: str
    lines: list[str]

    def __str__(self) -> str:
        return f"{self.source}: " + "; ".join(self.lines)


def reading_of(source: str, report: Struct) -> Reading:
    """Of a report, after the last page was read."""
    own = getattr(report, "summary", None)
    return Reading(source, own().splitlines() if own is not None else [in_words(report)])
