"""Sheets that are drawn word by word, and labels joined to what the PDF reader then finds on them.

The boxes of a drawn page are the reader's, like those of any other PDF; what a word is, the sheet knows. Both are joined
by order; a word that reads otherwise, or whose box is not where it was drawn, is an error and never a wrong label.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from engine.documents.page import Box, Page, normalise_box
from engine.documents.pdf import PdfReport, read_pdf_bytes
from engine.documents.tags import Span, tags_of

try:
    from reportlab.pdfbase.pdfmetrics import getAscentDescent, stringWidth  # type: ignore[import-untyped]
    from reportlab.pdfgen.canvas import Canvas  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        f"{error}: drawing pages needs the extra `documents` (pip install 'headrace[documents]')"
    ) from error

LEAST_OVERLAP = 0.5
"""A word must be read where it was drawn: intersection over union of the two boxes."""

Align = Literal["left", "right", "center"]
Part = tuple[str, str | None]
"""A text and the field that it is the value of."""
T = TypeVar("T")


class SynthesisError(RuntimeError):
    """A page does not read as it was drawn: a fault of the generator or the reader, so no page of the batch is used."""


class Style(Struct, frozen=True, kw_only=True):
    """How the pages of one template look. Lengths in points. `stacked`: a value stands below its key, not beside it."""

    family: str
    template: str
    width: float
    height: float
    margin: float
    font: str
    bold: str
    size: float
    stacked: bool
    colon: str
    capitals: bool
    rules: bool

    @property
    def leading(self) -> float:
        return 1.35 * self.size

    def pick(self, what: str, options: Sequence[T]) -> T:
        """A choice that is the same on every page of the template."""
        return random.Random(f"{self.template}/{what}").choice(options)


class Word(NamedTuple):
    """`x` of its left edge, `y` of its baseline from the page's top."""

    text: str
    x: float
    y: float
    font: str
    size: float


class Sheet:
    """One page being laid out: words in drawing order, which is their reading order, their entities, fields and links."""

    def __init__(self, style: Style, name: str) -> None:
        self.style, self.name = style, name
        self.words: list[Word] = []
        self.entities: list[Span] = []
        self.links: list[tuple[int, int]] = []
        self.fields: dict[str, str] = {}
        self.rules: list[tuple[float, float, float]] = []
        self.left, self.right = style.margin, style.width - style.margin

    def width(self, text: str, *, bold: bool = False, scale: float = 1.0) -> float:
        return float(stringWidth(text, self.style.bold if bold else self.style.font, scale * self.style.size))

    def wrap(self, text: str, width: float, *, bold: bool = False, scale: float = 1.0) -> list[str]:
        """Lines no wider than `width`, but for a word that alone is."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.width(f"{lines[-1]} {word}", bold=bold, scale=scale) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def put(
        self, lines: Sequence[str], x: float, y: float, *, field: str | None = None, bold: bool = False, scale: float = 1.0,
        align: Align = "left",
    ) -> tuple[int, float]:  # fmt: skip
        """Lines of text below each other, the first one's baseline at `y`; one entity when they are a field's value. `x` is
        the left edge, the right edge or the middle. Returns the index of the first word and the next line's `y`."""
        start = len(self.words)
        font, size = self.style.bold if bold else self.style.font, scale * self.style.size
        for line in lines:
            shift = {"left": 0.0, "right": 1.0, "center": 0.5}[align] * self.width(line, bold=bold, scale=scale)
            place = x - shift
            for word in line.split():
                self.words.append(Word(word, place, y, font, size))
                place += float(stringWidth(f"{word} ", font, size))
            y += scale * self.style.leading
        if field is not None:
            self._value(field, " ".join(lines), start)
        return start, y

    def flow(self, parts: Sequence[Part], x: float, y: float, width: float) -> float:
        """Running text, wrapped to `width`, in which some parts are values; a full stop or comma at a value's end is the
        sentence's. Returns the next line's `y`."""
        place = x
        for text, field in parts:
            start = len(self.words)
            for word in text.split():
                if place > x and place + self.width(word) > x + width:
                    place, y = x, y + self.style.leading
                self.words.append(Word(word, place, y, self.style.font, self.style.size))
                place += self.width(f"{word} ")
            if field is not None:
                self._value(field, text.rstrip(".,"), start)
        return y + self.style.leading

    def rule(self, y: float, x0: float | None = None, x1: float | None = None) -> None:
        self.rules.append((self.left if x0 is None else x0, self.right if x1 is None else x1, y))

    def _value(self, field: str, text: str, start: int) -> None:
        if field in self.fields:
            raise SynthesisError(f"{self.name}: field {field!r}: drawn twice, {self.fields[field]!r} and {text!r}")
        self.fields[field] = " ".join(text.split())
        self.entities.append(Span(field, start, len(self.words)))


def read_back(sheets: Sequence[Sheet]) -> list[Page]:
    """The sheets as pages: drawn as a PDF, read by the PDF reader, with their labels. Raises `SynthesisError` for any word
    that is not read as and where it was drawn."""
    report = PdfReport()
    read = list(read_pdf_bytes(_pdf(sheets), report, name="synthetic", where="a synthetic PDF"))
    if len(read) != len(sheets):
        raise SynthesisError(f"got {len(read)} pages, expected {len(sheets)}: {report.summary()}")
    if report.clipped_boxes:
        raise SynthesisError(f"{report.clipped_boxes} words run off the page, expected none")
    return [labelled(sheet, page) for sheet, page in zip(sheets, read, strict=True)]


def _pdf(sheets: Sequence[Sheet]) -> bytes:
    file = io.BytesIO()
    canvas = Canvas(file, invariant=1, pageCompression=0)
    for sheet in sheets:
        height = sheet.style.height
        canvas.setPageSize((sheet.style.width, height))
        canvas.setLineWidth(0.5)
        for x0, x1, y in sheet.rules:
            canvas.line(x0, height - y, x1, height - y)
        text = canvas.beginText()
        font: tuple[str, float] | None = None
        for word in sheet.words:
            if (word.font, word.size) != font:
                font = (word.font, word.size)
                text.setFont(*font)
            text.setTextOrigin(word.x, height - word.y)
            text.textOut(word.text)
        canvas.drawText(text)
        canvas.showPage()
    canvas.save()
    return file.getvalue()


def labelled(sheet: Sheet, page: Page) -> Page:
    """The page as it was read, with the sheet's labels. Raises `SynthesisError` where the two do not fit."""
    drawn = [word.text for word in sheet.words]
    for index, (text, word) in enumerate(zip(page.words, drawn, strict=False)):
        if text != word:
            raise SynthesisError(f"{sheet.name}: word {index}: read {text!r}, drawn {word!r}")
    if len(page.words) != len(drawn):
        raise SynthesisError(f"{sheet.name}: read {len(page.words)} words, drawn {len(drawn)}")
    for index, (box, word_drawn) in enumerate(zip(page.boxes, sheet.words, strict=True)):
        expected = _box(word_drawn, sheet.style)
        if (overlap := _overlap(box, expected)) <= LEAST_OVERLAP:
            raise SynthesisError(
                f"{sheet.name}: word {index} {word_drawn.text!r}: read at {box}, drawn at {expected}: they overlap by "
                f"{overlap:.2f}, expected more than {LEAST_OVERLAP}"
            )
    return msgspec.structs.replace(
        page,
        id=sheet.name,
        tags=tags_of(sheet.entities, len(drawn)),
        fields=dict(sorted(sheet.fields.items())),
        links=sheet.links,
        family=sheet.style.family,
        template=sheet.style.template,
    )


def _box(word: Word, style: Style) -> Box:
    ascent, descent = getAscentDescent(word.font, word.size)
    right = word.x + float(stringWidth(word.text, word.font, word.size))
    return normalise_box((word.x, word.y - ascent, right, word.y - descent), style.width, style.height)[0]


def _overlap(one: Box, two: Box) -> float:
    """Intersection over union of the cells that the boxes cover: their edges are cut to whole thousandths."""
    wide = min(one[2], two[2]) + 1 - max(one[0], two[0])
    high = min(one[3], two[3]) + 1 - max(one[1], two[1])
    if wide <= 0 or high <= 0:
        return 0.0
    areas = [(box[2] + 1 - box[0]) * (box[3] + 1 - box[1]) for box in (one, two)]
    return wide * high / (sum(areas) - wide * high)
