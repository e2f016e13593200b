"""Words and boxes from a PDF's own text layer, by pdfplumber. Nothing is recognised: a scan needs OCR before it gets here."""

from __future__ import annotations

import io
import logging
import math
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct, field

from engine.documents.page import Box, Page, normalise_box
from engine.documents.readings import in_words, refusals
from engine.fields import TaskError

try:
    import pdfplumber
    from pdfminer.pdfdocument import PDFPasswordIncorrect
    from pdfplumber.utils import extract_words
    from pdfplumber.utils.exceptions import MalformedPDFException, PdfminerException
except ImportError as error:
    raise ImportError(
        f"{error}: reading PDFs needs the extra `documents` (pip install 'headrace[documents]')"
    ) from error

_LOG = logging.getLogger(__name__)

WORD_GAP = 0.15
"""A gap of more than this part of the font's size ends a word (a space is about 0.25 of it)."""
SAME_PLACE = 1.5
"""Points: the same word again so near is the same word."""

_BROKEN = (
    PdfminerException, MalformedPDFException, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
    OSError, EOFError, RecursionError, struct.error, zlib.error,
)  # fmt: skip
"""What pdfminer raises on files that are no good: it checks little itself."""


class PdfReport(Struct):
    """What a reading met; `summary` says it in words. Pages: `kept` went on, each other one is counted by its reason."""

    files: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """File to reason: encrypted, or not a PDF that can be read."""
    pages: int = 0
    kept: int = 0
    words: int = 0
    rotated_pages: int = 0
    """Kept, shown by /Rotate or with most text drawn sideways or upside down: boxes are as a reader turns the page."""
    pages_without_text: int = 0
    """Left out: something is drawn, but no text. These need OCR."""
    unreadable_pages: int = 0
    """Left out: at least half of the words have no Unicode text (the font maps none). These need OCR too."""
    empty_pages: int = 0
    broken_pages: int = 0
    clipped_boxes: int = 0
    words_outside: int = 0
    """Left out: not on the visible page at all."""
    words_without_box: int = 0
    """Left out: no width or no height."""
    turned_words: int = 0
    """Left out: they run in another direction than most of their page."""
    repeated_words: int = 0
    """Left out: drawn again in the same place (a PDF's way to bold or to shadows)."""

    def summary(self) -> str:
        """One line with every count that is not zero, one for what needs OCR, and one for each of the first refused files."""
        lines = [in_words(self)]
        if need := self.pages_without_text + self.unreadable_pages:
            lines.append(f"{need} pages hold no text that can be read: run OCR on them first")
        return "\n".join([*lines, *refusals(self.refused)])


class _Turn(NamedTuple):
    """How a page's text runs: by how many quarter turns clockwise a reader turns the page to read it."""

    quarters: int

    def box(self, x0: float, y0: float, x1: float, y1: float, size: tuple[float, float]) -> tuple[float, ...]:
        """The box on the turned page; y down, `size` the page's width and height before."""
        width, height = size
        match self.quarters:
            case 1:
                return height - y1, x0, height - y0, x1
            case 2:
                return width - x1, height - y1, width - x0, height - y0
            case 3:
                return y0, width - x1, y1, width - x0
        return x0, y0, x1, y1


def read_pdf_folder(folder: Path, report: PdfReport) -> Iterator[Page]:
    """Pages of every *.pdf below `folder`, by path. A file that cannot be read is refused, with its reason in the report,
    and the others go on. Raises `TaskError` where there is no PDF at all."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".pdf" and path.is_file())
    if not paths:
        raise TaskError(f"{folder}: got no .pdf file, expected at least one")
    for path in paths:
        try:
            yield from read_pdf(path, report, name=path.relative_to(folder).with_suffix("").as_posix())
        except TaskError as error:
            report.refused[str(path)] = str(error)
            _LOG.warning("%s", error)


def read_pdf(path: Path, report: PdfReport, *, name: str | None = None) -> Iterator[Page]:
    """Pages of one PDF that hold words, in the order in which its words are drawn. Its pages' ids are "NAME-p001" and so on,
    their family is "pdf" and their template NAME (the file's own without `name`), so that a split can go by file.
    Raises `TaskError` for a file that is encrypted or cannot be read."""
    try:
        data = _bytes(path)
    except TaskError:
        report.files += 1
        raise
    yield from read_pdf_bytes(data, report, name=path.stem if name is None else name, where=str(path))


def read_pdf_bytes(data: bytes, report: PdfReport, *, name: str, where: str) -> Iterator[Page]:
    """As `read_pdf`, of a file's content; `where` names it in errors."""
    unread = report.pages_without_text + report.unreadable_pages
    pages = _open(data, report, where)
    for number, source in enumerate(pages, 1):
        report.pages += 1
        try:
            words, boxes, _ = _read_page(source, report)
        except _BROKEN as error:
            report.broken_pages += 1
            _LOG.warning("%s: page %d: cannot be read: %r", where, number, error)
            continue
        finally:
            source.close()
        if words:
            report.kept += 1
            report.words += len(words)
            yield _page(words, boxes, name, number)
    if unread := report.pages_without_text + report.unreadable_pages - unread:
        _LOG.warning("%s: %d of %d pages hold no text that can be read: they need OCR", where, unread, len(pages))


class PdfPage(NamedTuple):
    """`quarters`: by how many quarter turns clockwise a reader turns what a viewer shows (text drawn sideways or upside
    down). `report` is of this page alone."""

    page: Page
    quarters: int
    report: PdfReport


def read_pdf_page(path: Path, number: int) -> PdfPage:
    """One page, from 1. Raises `TaskError` for a file that cannot be read, a page that is not there, and a page without
    words, with the reason."""
    report = PdfReport()
    pages = _open(_bytes(path), report, str(path))
    if not 1 <= number <= len(pages):
        raise TaskError(f"{path}: page: got {number}, expected 1 to {len(pages)}")
    where = f"{path}: page {number}"
    try:
        words, boxes, turn = _read_page(pages[number - 1], report)
    except _BROKEN as error:
        raise TaskError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
    if report.pages_without_text or report.unreadable_pages:
        raise TaskError(f"{where}: has no text layer that can be read, as a scan has none; run OCR on it first")
    if not words:
        raise TaskError(f"{where}: has no words, expected at least one")
    return PdfPage(_page(words, boxes, path.stem, number), turn.quarters, report)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error


def _open(data: bytes, report: PdfReport, where: str) -> list[Any]:
    report.files += 1
    try:
        return list(pdfplumber.open(io.BytesIO(data)).pages)
    except _BROKEN as error:
        raise _refusal(where, error) from error


def _page(words: list[str], boxes: list[Box], name: str, number: int) -> Page:
    return Page(id=f"{name}-p{number:03d}", words=words, boxes=boxes, family="pdf", template=name)


def _refusal(where: str, error: BaseException) -> TaskError:
    cause = error.args[0] if isinstance(error, PdfminerException) and error.args else error
    if isinstance(cause, PDFPasswordIncorrect):
        return TaskError(f"{where}: is encrypted, and opens with a password only; expected a copy without one")
    return TaskError(f"{where}: not a PDF that can be read: {type(cause).__name__}: {cause}")


def _read_page(source: Any, report: PdfReport) -> tuple[list[str], list[Box], _Turn]:
    frame = _frame(source)
    size = frame[2] - frame[0], frame[3] - frame[1]
    if min(size) <= 0 or not all(map(math.isfinite, size)):
        raise ValueError(f"the page is {size[0]} x {size[1]} points, expected more than 0")
    chars = [char for char in source.chars if char["text"]]
    turns = [_turn(char["matrix"]) for char in chars]
    if not any(not char["text"].isspace() for char in chars):
        drawn = bool(source.images or source.curves)
        report.pages_without_text += drawn
        report.empty_pages += not drawn
        return [], [], _Turn(0)
    turn = Counter(turns).most_common(1)[0][0]
    straight = [_straight(char, turn, frame) for char, its in zip(chars, turns, strict=True) if its == turn]
    others = [char for char, its in zip(chars, turns, strict=True) if its != turn]
    report.turned_words += len(_words(others))
    found = _words(straight)
    if 2 * sum("(cid:" in word["text"] for word in found) >= len(found) > 0:
        report.unreadable_pages += 1
        return [], [], _Turn(0)
    report.rotated_pages += bool(turn.quarters or source.rotation)
    return *_place(found, size if turn.quarters % 2 == 0 else size[::-1], report), turn


def _frame(source: Any) -> tuple[float, float, float, float]:
    """The visible page (its crop box) in pdfplumber's coordinates, turned by /Rotate like its words are. pdfplumber's own
    `cropbox` is off on a rotated page whose margins differ."""
    media, crop = source.page_obj.mediabox, source.page_obj.cropbox
    x0, y0, x1, y1 = min(media[0::2]), min(media[1::2]), max(media[0::2]), max(media[1::2])
    left, top = min(crop[0::2]) - x0, y1 - max(crop[1::2])
    right, bottom = x1 - max(crop[0::2]), min(crop[1::2]) - y0
    margins = [max(float(margin), 0.0) for margin in (left, top, right, bottom)]
    for _ in range(source.rotation // 90):  # a quarter turn clockwise: what was at the bottom comes to the left
        margins = [margins[3], *margins[:3]]
    box = source.mediabox
    return box[0] + margins[0], box[1] + margins[1], box[2] - margins[2], box[3] - margins[3]


def _turn(matrix: tuple[float, ...]) -> _Turn:
    """From the direction in which a character's baseline runs, y up."""
    along, up = matrix[0], matrix[1]
    if abs(along) >= abs(up):
        return _Turn(0 if along >= 0 else 2)
    return _Turn(1 if up > 0 else 3)


def _straight(char: dict[str, Any], turn: _Turn, frame: tuple[float, float, float, float]) -> dict[str, Any]:
    """What `extract_words` needs of a character, on the turned page, from the frame's corner."""
    left, top, right, bottom = frame
    x0, y0, x1, y1 = turn.box(
        char["x0"] - left, char["top"] - top, char["x1"] - left, char["bottom"] - top, (right - left, bottom - top)
    )
    box = {"x0": x0, "top": y0, "x1": x1, "bottom": y1, "doctop": y0}
    return {"text": char["text"], "size": char["size"], "upright": True, **box}


def _words(chars: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Words in the order in which they are drawn: by place, a page of two columns would be read across both."""
    return extract_words(chars, use_text_flow=True, x_tolerance_ratio=WORD_GAP)


def _place(found: list[dict[str, Any]], size: tuple[float, ...], report: PdfReport) -> tuple[list[str], list[Box]]:
    words: list[str] = []
    boxes: list[Box] = []
    seen: dict[str, list[tuple[float, float]]] = {}
    for word in found:
        text = "".join(char for char in word["text"] if char.isprintable()).strip()
        x0, y0, x1, y1 = word["x0"], word["top"], word["x1"], word["bottom"]
        if not text:
            continue
        if not (all(map(math.isfinite, (x0, y0, x1, y1))) and x0 < x1 and y0 < y1):
            report.words_without_box += 1
        elif x1 <= 0 or y1 <= 0 or x0 >= size[0] or y0 >= size[1]:
            report.words_outside += 1
        elif any(abs(x0 - x) < SAME_PLACE and abs(y0 - y) < SAME_PLACE for x, y in seen.get(text, ())):
            report.repeated_words += 1
        else:
            seen.setdefault(text, []).append((x0, y0))
            box, clipped = normalise_box((x0, y0, x1, y1), size[0], size[1])
            report.clipped_boxes += clipped
            words.append(text)
            boxes.append(box)
    return words, boxes
