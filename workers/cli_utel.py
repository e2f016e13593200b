"""Commands on a trained UTel tagger: the entities of a PDF's page, the fields of many pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Tagger = Annotated[Path, typer.Argument(metavar="MODEL", help="A tagger's folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]


def utel_tag(
    model: Tagger,
    file: Annotated[Path, typer.Argument(metavar="FILE.pdf", help="A PDF with a text layer.")],
    page: Annotated[int, typer.Option(metavar="N", help="Which page, from 1.")] = 1,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Where the picture goes; beside the PDF if left out.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Print the entities on a PDF's page, and draw them on it."""
    from workers.utel_tag import tag

    tag(model, file, page, out, device)


def utel_extract(
    model: Tagger,
    pages: Annotated[
        Path,
        typer.Argument(metavar="IN", help="Receipts (.jsonl[.gz]; labels are not looked at), or a folder of PDFs."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl[.gz]", help="Gets a line a page: id and fields.")],
    device: Device = "auto",
) -> None:
    """Read company, date, address and total off receipts or PDFs."""
    from workers.utel_extract import extract

    extract(model, pages, out, device)


COMMANDS = (utel_tag, utel_extract)
