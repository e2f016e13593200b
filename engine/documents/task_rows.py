"""Documents as rows of prompts, with whole companies held out. No torch here."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from engine.config import DocumentsTask
from engine.documents.page import Page
from engine.documents.prompts import extraction_prompt
from engine.documents.sources import documents_with_words
from engine.documents.split import split_by_company
from engine.fields import TaskError
from engine.rows import Row, prompt_id, with_system

_LOG = logging.getLogger(__name__)


class DocumentRows:
    """Pages as rows; the held-out pool is a function of the pages alone (`split.split_by_company`, seed 0)."""

    def __init__(self, task: DocumentsTask, name: str) -> None:
        """Reads the documents. Raises `TaskError` for one that cannot be read, for no page at all, and for a page that
        nothing could grade."""
        self.task, self.name = task, name
        pages, self.reading = documents_with_words(task.path)
        if task.score.utel is not None and not task.fields:
            raise TaskError(
                f"task {name}: fields: got none with score.utel, which reads only the fields that are named"
            )
        train, held_out = split_by_company(pages, min(1.0, task.held_out / len(pages)))
        self._rows, self.pool = self._distinct(train), self._distinct(held_out)
        self._report(pages)

    def exclude(self, keys: frozenset[str]) -> None:
        """Training rows no longer hold these prompts. Raises `TaskError` when nothing is left."""
        self._rows = [row for row in self._rows if row.key not in keys]
        if not self._rows:
            raise TaskError(
                f"{self.task.path}: each of its pages is held out (held_out = {self.task.held_out}); none is left to train"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def _distinct(self, pages: Iterable[Page]) -> list[Row]:
        rows: dict[str, Row] = {}
        for page in pages:
            row = self._row(page)
            rows.setdefault(row.key, row)
        return list(rows.values())

    def _row(self, page: Page) -> Row:
        task = self.task
        wanted = task.fields or sorted(page.fields)
        labels = {name: page.fields[name] for name in wanted if name in page.fields}
        where = f"{task.path}: page {page.id}"
        if not labels and task.score.utel is None:
            raise TaskError(
                f"{where}: has no labels for {', '.join(wanted) or 'any field'}, and score.utel names no tagger to read it"
            )
        try:
            text = extraction_prompt(
                page,
                wanted,
                max_characters=task.max_characters,
                question=task.question,
                positions=task.positions,
                first_words=task.first_words,
            )
        except ValueError as error:
            raise TaskError(f"{where}: {error}") from error
        prompt = with_system(text, task.system)
        solution = json.dumps(labels, ensure_ascii=False) if labels else None
        return Row(
            index=0,
            prompt_id=prompt_id(self.name, prompt),
            task=self.name,
            prompt=prompt,
            answer=json.dumps(
                {"answer": solution or "", "document": _reference(page, wanted, labels)}, ensure_ascii=False
            ),
            solution=solution,
            chat=task.chat,
            where=where,
        )

    def _report(self, pages: Sequence[Page]) -> None:
        missed = [(page.id, name) for page in pages for name in missed_labels(page, self.task.fields)]
        if missed:
            _LOG.warning(
                "%s: %d labels stand nowhere on their page (a response can still be graded by them), the first: %s of %s",
                self.task.path, len(missed), missed[0][1], missed[0][0],
            )  # fmt: skip
        if unlabelled := sum(not page.fields for page in pages):
            _LOG.warning(
                "%s: %d of %d pages have no labels; UTel's reading stands in", self.task.path, unlabelled, len(pages)
            )


def missed_labels(page: Page, wanted: Sequence[str]) -> list[str]:
    """The labels of these names whose text stands nowhere on a page of receipts: no word is tagged for them."""
    if page.family != "sroie" or page.tags is None:
        return []
    tagged = {tag.partition("-")[2] for tag in page.tags}
    return [name for name in wanted if name in page.fields and name not in tagged]


def _reference(page: Page, wanted: Sequence[str], labels: dict[str, str]) -> dict[str, Any]:
    """`engine.documents.grading.Reference` as JSON."""
    return {
        "id": page.id,
        "wanted": list(wanted),
        "labels": labels or None,
        "missed": len(missed_labels(page, wanted)),
        "words": page.words,
        "boxes": page.boxes,
    }
