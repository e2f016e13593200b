"""Pages as rows of the log, and back: a page travels as the UTF-8 of its JSON, its tags as the response to it. No torch here."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from engine.config_pages import PagesTask
from engine.documents.joining import join, joined
from engine.documents.page import SIZE, Box, Page
from engine.documents.sources import documents_with_words
from engine.documents.split import split_by_company
from engine.fields import TaskError
from engine.rows import Prompt, Row, prompt_id, prompt_text

HIDDEN: Box = (0, 0, 0, 0)
END = 0
"""The token after a response; no text has this byte."""


class ReadPage(Struct, frozen=True):
    """What the model sees of a page."""

    id: str
    words: list[str]
    boxes: list[Box]


class PageText:
    """In place of a tokenizer: the tokens are bytes, so that the log needs no other column for pages."""

    eos = END

    def encode_prompt(self, prompt: Prompt, *, chat: bool) -> np.ndarray:
        """int32 [bytes]"""
        return self.encode(prompt_text(prompt))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def varied(page: ReadPage, share: float, key: str) -> ReadPage:
    """The page with its digits permuted, moved and scaled by up to `share`; a function of the key."""
    drawn = random.Random(key)
    digits = list("0123456789")
    drawn.shuffle(digits)
    table = str.maketrans("0123456789", "".join(digits))
    scales, shifts = ([drawn.uniform(-share, share) for _ in "xy"] for _ in range(2))

    def moved(edge: int, axis: int) -> int:
        return round(min(max(SIZE / 2 + (edge - SIZE / 2) * (1 + scales[axis]) + shifts[axis] * SIZE / 2, 0), SIZE))

    boxes = [(moved(a, 0), moved(b, 1), moved(c, 0), moved(d, 1)) for a, b, c, d in page.boxes]
    return ReadPage(page.id, [word.translate(table) for word in page.words], boxes)


def page_of(prompt: np.ndarray) -> ReadPage:
    """The page of a group's prompt. Raises `TaskError` for anything else."""
    try:
        return msgspec.json.decode(prompt.astype(np.uint8).tobytes(), type=ReadPage)
    except msgspec.DecodeError as error:
        raise TaskError(f"a group's prompt is no page: {error}; expected the log of a run that reads pages") from error


def page_in(row: Row) -> ReadPage:
    """The page of a row that `page_row` made."""
    return page_of(PageText().encode_prompt(row.prompt, chat=False))


def tags_of_row(row: Row) -> list[str] | None:
    """The BIO tags of a row that `page_row` made; None where the page has none."""
    return tags_in(PageText().encode(row.solution or ""))


def tags_in(response: np.ndarray) -> list[str] | None:
    """The BIO tags of a group's response, one a word; None where the page has none. Raises `TaskError`."""
    data = response[response != END].astype(np.uint8).tobytes()
    try:
        return msgspec.json.decode(data, type=list[str]) if data else None
    except msgspec.DecodeError as error:
        raise TaskError(f"a group's response is no list of tags: {error}") from error


class PageRows:
    """The pages of a file or a folder that have words; the held-out pool is a function of the pages alone."""

    def __init__(self, task: PagesTask, name: str) -> None:
        """Reads them. Raises `TaskError` for what cannot be read, and when there is no page with words."""
        self.name, self.boxes, self.where = name, task.boxes, str(task.path)
        pages, self.reading = documents_with_words(self.where)
        train, held_out = split_by_company(pages, min(1.0, task.held_out / len(pages)))
        self._rows, self.pool = (list(self._distinct(joined(side, task.joined))) for side in (train, held_out))

    def exclude(self, keys: frozenset[str]) -> None:
        """Training rows no longer hold these pages. Raises `TaskError` when nothing is left."""
        self._rows = [row for row in self._rows if row.key not in keys]
        if not self._rows:
            raise TaskError(f"{self.where}: each of its pages is held out; none is left to train")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def _distinct(self, pages: Iterable[Page]) -> Iterable[Row]:
        rows = (page_row(page, self.name, self.boxes, f"{self.where}: page {page.id}") for page in pages)
        return {row.key: row for row in rows}.values()


class SyntheticRows:
    """Pages that are drawn when they are asked for. What is held out has other values, and templates of its own."""

    def __init__(self, task: PagesTask, name: str) -> None:
        from engine.documents.synthetic import synthetic_page  # needs the extra `documents`

        self.task, self.name, self._draw = task, name, synthetic_page
        self.pool = [self._row("test", index) for index in range(task.held_out // task.joined)]

    def exclude(self, keys: frozenset[str]) -> None:
        """Nothing to do: values and templates of the two sides differ."""

    def __len__(self) -> int:
        return self.task.synthetic // self.task.joined

    def __getitem__(self, index: int) -> Row:
        return self._row("train", index)

    def _row(self, split: Literal["train", "test"], index: int) -> Row:
        together = self.task.joined
        drawn = [self._draw(split, index * together + place, seed=self.task.seed) for place in range(together)]
        page = drawn[0] if together == 1 else join(drawn)
        return page_row(page, self.name, self.task.boxes, f"{self.name}: page {page.id}")


def page_row(page: Page, task: str, boxes: str, where: str) -> Row:
    """The prompt is the page as the model is to see it, the solution its tags ("" without any)."""
    seen = list(page.boxes)
    if boxes == "hidden":
        seen = [HIDDEN] * len(seen)
    elif boxes == "shuffled":
        random.Random(page.id).shuffle(seen)
    prompt = msgspec.json.encode(ReadPage(page.id, page.words, seen)).decode()
    solution = "" if page.tags is None else msgspec.json.encode(page.tags).decode()
    return Row(
        index=0, prompt_id=prompt_id(task, prompt), task=task, prompt=prompt, answer=msgspec.json.encode(page.fields).decode(),
        solution=solution, chat=False, where=where,
    )  # fmt: skip
