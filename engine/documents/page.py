"""One page of a document: its words, where they stand and what they are; and files of pages, one JSON object a line."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, cast

import msgspec
from msgspec import Struct

from engine.documents.tags import tag_fault
from engine.fields import TaskError, read_jsonl

__all__ = ["SIZE", "Box", "Page", "TaskError", "normalise_box", "read_pages", "write_pages", "write_rows"]

SIZE = 1000
"""Boxes are in thousandths of the page's width and height."""

Box = tuple[int, int, int, int]


class Page(Struct, frozen=True, kw_only=True):
    """Words of one page in reading order, which is the lists' order.

    `boxes` are (x0, y0, x1, y1) in 0..1000 from the top left corner, x in thousandths of the page's width and y of its
    height. `tags` are BIO entity tags, one a word ("B-total", "I-total", "O"); None where nobody tagged the page.
    `fields` are the page's labels as text; a field may be labelled without any word that is tagged for it. `links` are
    (index of the key's first word, index of the value's first word). `family` and `template` say what drew the page;
    empty for pages from elsewhere. Raises `ValueError` for lists that do not fit together.
    """

    id: str
    words: list[str]
    boxes: list[Box]
    tags: list[str] | None = None
    fields: dict[str, str] = {}
    links: list[tuple[int, int]] = []
    family: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id: got an empty text")
        if len(self.boxes) != len(self.words):
            raise ValueError(f"boxes: got {len(self.boxes)}, expected one for each of the {len(self.words)} words")
        for index, word in enumerate(self.words):
            if not word.strip():
                raise ValueError(f"words[{index}]: got {word!r}, expected a text that is not blank")
        for index, (x0, y0, x1, y1) in enumerate(self.boxes):
            if not (0 <= x0 <= x1 <= SIZE and 0 <= y0 <= y1 <= SIZE):
                raise ValueError(
                    f"boxes[{index}]: got {(x0, y0, x1, y1)}, expected 0 <= x0 <= x1 <= {SIZE} and the same for y"
                )
        if self.tags is not None:
            if len(self.tags) != len(self.words):
                raise ValueError(f"tags: got {len(self.tags)}, expected one for each of the {len(self.words)} words")
            if fault := tag_fault(self.tags):
                raise ValueError(fault)
        for index, link in enumerate(self.links):
            if not all(0 <= end < len(self.words) for end in link):
                raise ValueError(f"links[{index}]: got {link}, expected word indices below {len(self.words)}")


def normalise_box(box: tuple[float, float, float, float], width: float, height: float) -> tuple[Box, bool]:
    """The box in thousandths of a page of this size, truncated as UTel's own code does, and whether it had to be clipped
    to the page. Corners may come in any order."""
    x0, x1 = sorted((box[0] * SIZE / width, box[2] * SIZE / width))
    y0, y1 = sorted((box[1] * SIZE / height, box[3] * SIZE / height))
    slack = SIZE * 1e-6  # a float's rounding at the page's edge is no overhang
    clipped = min(x0, y0) < -slack or max(x1, y1) > SIZE + slack
    left, top, right, bottom = (int(min(max(edge, 0.0), float(SIZE))) for edge in (x0, y0, x1, y1))
    return (left, top, right, bottom), clipped


def read_pages(path: Path) -> Iterator[Page]:
    """The pages of a .jsonl or .jsonl.gz file. Raises `TaskError` that names file, line and field."""
    for where, fields in read_jsonl(path):
        try:
            yield msgspec.convert(fields, Page)
        except msgspec.ValidationError as error:
            raise TaskError(f"{where}: not a page: {error}") from error


def write_pages(path: Path, pages: Iterable[Page]) -> int:
    """`write_rows` of pages."""
    return write_rows(path, pages)


def write_rows(path: Path, rows: Iterable[object]) -> int:
    """Writes a .jsonl or .jsonl.gz file, whole or not at all, and returns how many rows it holds. The same rows give the
    same bytes. Raises `TaskError` where the file cannot be written."""
    count = 0
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    encoder = msgspec.json.Encoder()
    try:
        with part.open("wb") as raw:
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else None
            file = cast(IO[bytes], packed or raw)
            for row in rows:
                file.write(encoder.encode(row) + b"\n")
                count += 1
            if packed is not None:
                packed.close()
        part.replace(path)
    except OSError as error:
        raise TaskError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)
    return count
