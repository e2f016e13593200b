"""`headrace utel-extract`: the fields of many receipts, a line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from engine.config import ConfigError
from engine.documents.page import write_rows
from engine.documents.sroie import FIELDS, SroieReport, read_sroie_jsonl
from engine.utel.reading import Reader


class Extracted(Struct, frozen=True):
    """A line of the output."""

    id: str
    fields: dict[str, str]


def extract(model: Path, source: Path, out: Path, device: str) -> None:
    """Writes one line a receipt, in the file's order; the file appears whole or not at all. Raises `ConfigError` for a model
    or a row that cannot be read."""
    reader = Reader(model, device=device)
    if missing := [name for name in FIELDS if name not in reader.types]:
        raise ConfigError(
            f"{model}: this tagger knows {', '.join(reader.types) or 'no entity types'}, expected {', '.join(missing)} too"
        )
    report, counts = SroieReport(), Counter[str]()

    def lines() -> Iterator[Extracted]:
        for page, found in reader.each(read_sroie_jsonl(source, report, labels=False), FIELDS):
            counts.update(found.keys())
            yield Extracted(page.id, {name: field.value for name, field in found.items()})

    pages = write_rows(out, lines())
    Console(highlight=False).print(
        Text(
            f"{pages} pages, {report.words} words"
            + (f", {report.clipped_boxes} boxes clipped to their page" if report.clipped_boxes else "")
            + f"; found {', '.join(f'{name} on {counts[name]}' for name in FIELDS)}\n{out}"
        ),
        soft_wrap=True,
    )
