"""Documents from wherever a path leads: receipts or pages in a file, a folder in SROIE's or FUNSD's layout, a folder of PDFs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from engine.documents.funsd import FunsdReport, read_funsd_folder
from engine.documents.page import Page, read_pages
from engine.documents.readings import Reading, reading_of
from engine.documents.sroie import SroieReport, read_sroie_folder, read_sroie_jsonl
from engine.fields import TaskError, read_jsonl


class PageReport(Struct):
    """Of a file of pages."""

    pages: int = 0
    words: int = 0


class Documents(NamedTuple):
    """`report` has counted everything when the last page is read."""

    pages: Iterator[Page]
    report: Struct


def read_documents(path: Path, *, labels: bool = True) -> Documents:
    """The pages at `path`; what is there shows in the file's first row and in the folder's names. Without `labels` those of
    receipts are not looked at. Raises `TaskError`."""
    if not path.is_dir():
        _, first = next(read_jsonl(path), ("", {}))
        if "lines" in first:
            receipts = SroieReport()
            return Documents(read_sroie_jsonl(path, receipts, labels=labels), receipts)
        pages = PageReport()
        return Documents(_counted(path, pages), pages)
    if (path / "annotations").is_dir():
        forms = FunsdReport()
        return Documents(read_funsd_folder(path, forms), forms)
    if (path / "box").is_dir():
        receipts = SroieReport()
        return Documents(read_sroie_folder(path, receipts, labels=labels), receipts)
    from engine.documents.pdf import PdfReport, read_pdf_folder  # needs the extra `documents`

    files = PdfReport()
    return Documents(read_pdf_folder(path, files), files)


def documents_with_words(path: str) -> tuple[list[Page], Reading]:
    """The pages of `read_documents` that have words, and what the reading met. Raises `TaskError` as it does, and when there is
    none."""
    found, report = read_documents(Path(path))
    read = list(found)
    pages, reading = [page for page in read if page.words], reading_of(path, report)
    if not pages:
        raise TaskError(f"{path}: got no page with words, expected at least one; {'; '.join(reading.lines)}")
    if blank := len(read) - len(pages):
        reading.lines.append(f"{blank} pages without words were left out")
    return pages, reading


def _counted(path: Path, report: PageReport) -> Iterator[Page]:
    for page in read_pages(path):
        report.pages += 1
        report.words += len(page.words)
        yield page
