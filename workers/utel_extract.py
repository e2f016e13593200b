"""`headrace utel-extract`: the fields of many pages, a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from engine.config import ConfigError
from engine.documents.page import write_rows
from engine.documents.readings import reading_of
from engine.documents.sources import read_documents
from engine.documents.sroie import FIELDS
from engine.utel.reading import Reader


class Extracted(Struct, frozen=True):
    """A line of the output."""

    id: str
    fields: dict[str, str]


def extract(model: Path, source: Path, out: Path, device: str) -> None:
    """Writes one line a page of a file of receipts or a folder of PDFs, in their order; the file appears whole or not at all.
    Says what was turned, clipped and left out. Raises `ConfigError` for a model or a row that cannot be read."""
    reader = Reader(model, device=device)
    if missing := [name for name in FIELDS if name not in reader.types]:
        raise ConfigError(
            f"{model}: this tagger knows {', '.join(reader.types) or 'no entity types'}, expected {', '.join(missing)} too"
        )
    (pages, report), counts = read_documents(source, labels=False), Counter[str]()

    def lines() -> Iterator[Extracted]:
        for page, found in reader.each(pages, FIELDS):
            counts.update(found.keys())
            yield Extracted(page.id, {name: field.value for name, field in found.items()})

    written = write_rows(out, lines())
    read = reading_of(str(source), report).lines
    found = f"{written} pages; found {', '.join(f'{name} on {counts[name]}' for name in FIELDS)}"
    Console(highlight=False).print(Text("\n".join([*read, found, str(out)])), soft_wrap=True)
