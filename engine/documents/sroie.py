"""Receipts of ICDAR 2019's SROIE data set, from a JSON lines file or from the official folders.

Its boxes are of lines. Words get theirs by cutting the line: each character, spaces included, takes the same share of the
line's width. Labels become word tags by `matching.tag_fields`; what matches nowhere is counted as a miss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, field
from PIL import Image

from engine.config_tasks import RECEIPT_FIELDS
from engine.documents.matching import Line, tag_fields
from engine.documents.page import Box, Page, normalise_box
from engine.fields import TaskError, read_jsonl

FIELDS = RECEIPT_FIELDS
WHERE = "public ICDAR 2019 SROIE data (task 3 of the challenge on scanned receipts), training set"
_WORD = re.compile(r"\S+")


class SroieReport(Struct):
    """What an import met. Counts by field name: `labelled` labels, `missed` ones whose text stands nowhere on the page,
    `ambiguous` ones that stand at more than one place. `sizes_from_boxes`: receipts without an image, whose page is taken to
    end where the last box does."""

    pages: int = 0
    lines: int = 0
    words: int = 0
    clipped_boxes: int = 0
    sizes_from_boxes: int = 0
    labelled: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))
    missed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))
    ambiguous: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS, 0))


class _Line(Struct):
    box: tuple[float, float, float, float]
    text: str


class _Receipt(Struct):
    id: str
    width: int
    height: int
    lines: list[_Line]
    fields: dict[str, str] = {}


def read_sroie_jsonl(path: Path, report: SroieReport, *, labels: bool = True) -> Iterator[Page]:
    """Pages of a .jsonl(.gz) file of {"id", "width", "height", "lines": [{"box", "text"}], "fields"}, boxes in pixels.
    Without `labels` nobody looks at "fields", which may then be anything or missing. Raises `TaskError` that names file and
    line."""
    for where, fields in read_jsonl(path):
        if not labels:
            fields = {**fields, "fields": {}}
        try:
            receipt = msgspec.convert(fields, _Receipt, strict=False)
        except msgspec.ValidationError as error:
            raise TaskError(f"{where}: not a receipt: {error}") from error
        yield _page(where, receipt, report)


def read_sroie_folder(folder: Path, report: SroieReport, *, labels: bool = True) -> Iterator[Page]:
    """Pages of the official layout: `box/*.csv` (or .txt) with eight numbers and the text a line, `key/*.json` (or .txt)
    with the labels (not looked at without `labels`), and `img/*.jpg` for the pages' sizes. Raises `TaskError` that names the
    file and line."""
    boxes = sorted(path for path in folder.glob("box/*") if path.suffix in (".csv", ".txt"))
    if not boxes:
        raise TaskError(f"{folder}: no box/*.csv or box/*.txt, expected the layout of {WHERE}")
    for path in boxes:
        lines = [
            _quad_line(f"{path}:{number}", text)
            for number, text in enumerate(_text(path).splitlines(), 1)
            if text.strip()
        ]
        width, height = _size(folder, path.stem, lines, report)
        fields = _labels(folder, path.stem) if labels else {}
        yield _page(str(path), _Receipt(path.stem, width, height, lines, fields), report)


def _page(where: str, receipt: _Receipt, report: SroieReport) -> Page:
    if receipt.width < 1 or receipt.height < 1:
        raise TaskError(f"{where}: got a page of {receipt.width} x {receipt.height} pixels, expected at least 1 x 1")
    if not receipt.id:
        raise TaskError(f"{where}: id: got an empty text")
    words: list[str] = []
    boxes: list[Box] = []
    lines: list[Line] = []
    for line in receipt.lines:
        start = len(words)
        for word, box in cut_line(line.text, line.box):
            words.append(word)
            normalised, clipped = normalise_box(box, receipt.width, receipt.height)
            boxes.append(normalised)
            report.clipped_boxes += clipped
        lines.append(Line(line.box, start, len(words)))
    fields = {name: value for name, value in receipt.fields.items() if name in FIELDS and value.strip()}
    tags, places = tag_fields(words, lines, fields)
    for name, count in places.items():
        report.labelled[name] += 1
        report.missed[name] += count == 0
        report.ambiguous[name] += count > 1
    report.pages += 1
    report.lines += len(lines)
    report.words += len(words)
    return Page(id=receipt.id, words=words, boxes=boxes, tags=tags, fields=fields, family="sroie")


def cut_line(text: str, box: tuple[float, float, float, float]) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The line's words, each with its part of the line's box: equal width for every character, spaces included."""
    x0, y0, x1, y1 = box
    share = (x1 - x0) / max(len(text), 1)
    return [(word[0], (x0 + word.start() * share, y0, x0 + word.end() * share, y1)) for word in _WORD.finditer(text)]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:  # a few of the published files
        return data.decode("latin-1")


def _quad_line(where: str, text: str) -> _Line:
    parts = text.split(",", 8)
    try:
        numbers = [float(part) for part in parts[:8]]
    except ValueError:
        numbers = []
    if len(parts) < 9 or len(numbers) < 8:
        raise TaskError(f"{where}: got {text[:80]!r}, expected x1,y1,x2,y2,x3,y3,x4,y4,TEXT")
    xs, ys = numbers[0::2], numbers[1::2]
    return _Line((min(xs), min(ys), max(xs), max(ys)), parts[8])


def _size(folder: Path, stem: str, lines: list[_Line], report: SroieReport) -> tuple[int, int]:
    for suffix in (".jpg", ".jpeg", ".png"):
        path = folder / "img" / f"{stem}{suffix}"
        if path.exists():
            return image_size(path)
    report.sizes_from_boxes += 1
    return int(max((line.box[2] for line in lines), default=1)) or 1, int(
        max((line.box[3] for line in lines), default=1)
    ) or 1


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels, from the file's head. Raises `TaskError`."""
    try:
        with Image.open(path) as image:
            return image.size
    except OSError as error:
        raise TaskError(f"{path}: not an image that can be read: {error}") from error


def _labels(folder: Path, stem: str) -> dict[str, str]:
    for suffix in (".json", ".txt"):
        path = folder / "key" / f"{stem}{suffix}"
        if path.exists():
            break
    else:
        raise TaskError(f"{folder / 'key' / stem}.json: there is none, expected the labels of box/{stem}")
    try:
        return msgspec.convert(json.loads(_text(path)), dict[str, str])
    except (ValueError, msgspec.ValidationError) as error:
        raise TaskError(f"{path}: got no JSON object of texts: {error}") from error
