"""`headrace utel-tag`: the entities on a PDF's page, printed and drawn."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.documents.pdf import read_pdf_page
from engine.documents.pdf_picture import Mark, draw_page, mark
from engine.fields import TaskError
from engine.utel.reading import Reader


def tag(model: Path, file: Path, number: int, out: Path | None, device: str) -> None:
    """Prints a page's entities as a table and writes the picture. Raises `ConfigError` for a model or a page that cannot be
    read."""
    page, quarters, report = read_pdf_page(file, number)
    found = Reader(model, device=device).entities([page])[0]
    table = Table(title=Text(f"{file}, page {number}: {len(found)} entities in {len(page.words)} words"))
    for name in ("field", "text", "box", "confidence"):
        table.add_column(name, overflow="fold")
    for type_, start, stop, confidence in found:
        boxes = page.boxes[start:stop]
        left, top, right, bottom = zip(*boxes, strict=True)
        box = f"{min(left)} {min(top)} {max(right)} {max(bottom)}"
        table.add_row(type_, Text(" ".join(page.words[start:stop])), box, f"{confidence:.3f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(Text(report.summary()), soft_wrap=True)
    picture = draw_page(file, number, quarters)
    mark(picture, page, [Mark(type_, start, stop, f"{type_} {share:.2f}") for type_, start, stop, share in found])
    path = out or file.with_name(f"{page.id}.png")
    try:
        picture.save(path, format="PNG")
    except OSError as error:
        raise TaskError(f"{path}: cannot be written: {error.strerror or error}") from error
    console.print(Text(f"picture: {path}"), soft_wrap=True)
