"""A page of a PDF as a picture, with spans of its words marked on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pypdfium2  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont

from engine.documents.page import SIZE, Page
from engine.documents.rows import rows
from engine.fields import TaskError

COLOURS = ("#c1272d", "#0055a4", "#00843d", "#8e44ad", "#d35400", "#007a87", "#7f6000", "#5d3a9b")
LONG_SIDE = 1600
"""Pixels of the picture's longer side."""


class Mark(NamedTuple):
    """Words start..stop-1, shown with a text; marks of one `kind` have one colour."""

    kind: str
    start: int
    stop: int
    text: str


def draw_page(path: Path, number: int, quarters: int) -> Image.Image:
    """What a viewer shows of page `number` (from 1), turned by quarter turns clockwise. Raises `TaskError`."""
    try:
        with pypdfium2.PdfDocument(path) as document:
            page = document[number - 1]
            picture = page.render(scale=LONG_SIDE / max(page.get_size())).to_pil().convert("RGB")
    except pypdfium2.PdfiumError as error:
        raise TaskError(f"{path}: page {number}: cannot be drawn: {error}") from error
    return picture.rotate(-90 * quarters, expand=True)


def mark(picture: Image.Image, page: Page, marks: Sequence[Mark]) -> None:
    """Draws a frame around each mark's words, one a row, and its text above the first."""
    kinds = sorted({kind for kind, *_ in marks})
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(LONG_SIDE // 80)
    for kind, start, stop, text in marks:
        colour = COLOURS[kinds.index(kind) % len(COLOURS)]
        frames = [_frame(page, [start + place for place in row], picture.size) for row in rows(page.boxes[start:stop])]
        for frame in frames:
            pen.rectangle(frame, outline=colour, width=3)
        left, top = frames[0][0], max(frames[0][1] - LONG_SIDE // 80 - 6, 0)
        pen.rectangle(pen.textbbox((left, top), text, font), fill="white")
        pen.text((left, top), text, fill=colour, font=font)


def _frame(page: Page, words: Sequence[int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels around these words, with 2 to spare."""
    boxes = [page.boxes[word] for word in words]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    width, height = size
    return left * width // SIZE - 2, top * height // SIZE - 2, right * width // SIZE + 2, bottom * height // SIZE + 2
