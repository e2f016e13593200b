"""Extracted fields: the JSON object in a model's text, and how two sides compare field by field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct

from engine.documents.values import normal

LAST_PLACES = 100
"""An object is looked for at the last this many places of a text where one can begin: the bound on the work."""

_OBJECT_BEGINS = re.compile(r'\{\s*["}]')
_DECODER = json.JSONDecoder(
    strict=False
)  # a line break inside a string is the model's, and no reason to lose the object


class FieldScore(Struct, frozen=True):
    """Counts of fields, of one page or of many; they add up, and precision, recall and F1 of a sum are micro averages."""

    matched: int = 0
    predicted: int = 0
    labelled: int = 0

    def __add__(self, other: FieldScore) -> FieldScore:
        return FieldScore(
            self.matched + other.matched, self.predicted + other.predicted, self.labelled + other.labelled
        )

    @property
    def precision(self) -> float:
        """1 where nothing was predicted and nothing was there to predict."""
        return self.matched / self.predicted if self.predicted else float(not self.labelled)

    @property
    def recall(self) -> float:
        """1 where nothing was there to find and nothing was predicted."""
        return self.matched / self.labelled if self.labelled else float(not self.predicted)

    @property
    def f1(self) -> float:
        total = self.predicted + self.labelled
        return 2 * self.matched / total if total else 1.0


def compare(predicted: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, FieldScore]:
    """Counts by field name, for the names of both sides. A field matches when its values have the same normal form
    (`values.normal`); a value without a letter or digit is no value. A predicted field that is not labelled counts
    against precision, whatever its name."""
    found, wanted = _normal_fields(predicted), _normal_fields(labels)
    return {
        name: FieldScore(
            matched=int(name in found and found[name] == wanted.get(name)),
            predicted=int(name in found),
            labelled=int(name in wanted),
        )
        for name in sorted(found.keys() | wanted.keys())
    }


def total(scores: Iterable[FieldScore]) -> FieldScore:
    """The micro sum."""
    return sum(scores, FieldScore())


def field_name(name: str) -> str:
    """Names are compared without case; spaces and hyphens are underscores ("Due date" is "due_date")."""
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _normal_fields(fields: Mapping[str, str]) -> dict[str, str]:
    named = ((field_name(name), value) for name, value in fields.items())
    return {name: form for name, value in named if (form := normal(name, value))}


# --- from a response to fields -------------------------------------------------------------------------------------


def extract_fields(text: str) -> dict[str, str]:
    """The fields that a model's response gives; none where it gives none. Never raises.

    What counts is the last complete JSON object in the text that is in no other object, whatever stands around it (code
    fences, prose, an earlier draft). Numbers become their text, a list of texts and numbers (an address by lines) is
    joined with spaces; null, true, false, nested objects and empty texts are no values. Of a name that repeats the last
    value counts.
    """
    return {name: given for name, value in (last_object(text) or {}).items() if (given := _as_text(value)) is not None}


def has_object(text: str) -> bool:
    """Whether there is a complete JSON object in `text`, an empty one included."""
    return last_object(text) is not None


def last_object(text: str) -> dict[str, Any] | None:
    """The last complete JSON object in `text` that is in no other object; None where there is none."""
    places = [match.start() for match in _OBJECT_BEGINS.finditer(text)][-LAST_PLACES:]
    found: dict[str, Any] | None = None
    end = 0
    for place in places:
        if place < end:
            continue
        try:
            found, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):  # not JSON; too many digits; nested too deeply
            continue
    return found


def _as_text(value: object) -> str | None:
    match value:
        case str():
            return value.strip() or None
        case bool():
            return None
        case int() | float():
            return str(value)
        case list():
            parts = [part for entry in value if not isinstance(entry, list) and (part := _as_text(entry)) is not None]
            return " ".join(parts) or None
    return None
