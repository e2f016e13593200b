"""Rows of prompts: a .jsonl file read once, or a reasoning-gym data set made row by row. No torch here."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash
from msgspec import Struct

from engine.config import JsonlTask, ReasoningGymTask
from engine.fields import Format, TaskError, field_at, read_jsonl

Prompt = str | list[dict[str, Any]]

_LOG = logging.getLogger(__name__)


class Row(Struct, frozen=True):
    """One prompt of one task.

    `prompt` is a text or chat messages, `chat` says whether the chat template is applied; `answer` is the JSON document
    that the scorer gets: reasoning-gym's whole entry, or `{"answer": text, "row": the file's row}`; `where` names the
    row in messages ("train.jsonl:17"). `prompt_id` is a hash of the task's name and the prompt.
    """

    index: int
    prompt_id: str
    task: str
    prompt: Prompt
    answer: str
    solution: str | None
    chat: bool
    where: str

    @property
    def key(self) -> str:
        """Equal for equal prompts, whatever their task."""
        return prompt_key(self.prompt)


def prompt_text(prompt: Prompt) -> str:
    """What a log keeps as the text of a prompt: the text itself, or the messages as JSON."""
    return prompt if isinstance(prompt, str) else msgspec.json.encode(prompt).decode()


def prompt_key(prompt: Prompt) -> str:
    """A text that two prompts share exactly when they are the same."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


class JsonlRows:
    """The distinct rows of a .jsonl or .jsonl.gz file, and a held-out pool that is a function of their prompts alone:
    the ones with the smallest hashes, or the rows of `held_out_path`."""

    def __init__(self, task: JsonlTask, name: str) -> None:
        self.task, self.name = task, name
        self._prompt_format = Format(task.prompt, f"task {name}: prompt")
        self._answer_format = Format(task.answer, f"task {name}: answer")
        self._solution_format = None if task.solution is None else Format(task.solution, f"task {name}: solution")
        self._rows = self._read(task.path)
        if task.held_out_path is not None:
            self.pool = self._read(task.held_out_path)
        else:
            self.pool = sorted(self._rows, key=lambda row: xxhash.xxh3_64_intdigest(row.key.encode()))[: task.held_out]

    def exclude(self, keys: frozenset[str]) -> None:
        """Training rows no longer hold these prompts. Raises `TaskError` when nothing is left."""
        self._rows = [row for row in self._rows if row.key not in keys]
        if not self._rows:
            raise TaskError(
                f"{self.task.path}: each of its prompts is held out (held_out = {self.task.held_out}); none is left to train"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def _read(self, path: str) -> list[Row]:
        rows: dict[str, Row] = {}
        count = 0
        for where, fields in read_jsonl(Path(path)):
            count += 1
            prompt = self._prompt(where, fields)
            key = prompt_key(prompt)
            if key not in rows:
                rows[key] = self._row(where, fields, prompt)
        if not rows:
            raise TaskError(f"{path}: got no row, expected at least one")
        if count > len(rows):
            _LOG.warning(
                "%s: %d rows repeat an earlier prompt and are left out, %d remain", path, count - len(rows), len(rows)
            )
        return list(rows.values())

    def _prompt(self, where: str, fields: Mapping[str, Any]) -> Prompt:
        if self.task.messages is None:
            return with_system(_text(self._prompt_format, where, fields), self.task.system)
        messages = field_at(where, fields, self.task.messages)
        good = isinstance(messages, list) and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in messages
        )
        if not (good and messages):
            got = json.dumps(messages, ensure_ascii=False)[:120]
            raise TaskError(f'{where}: {self.task.messages}: got {got}, expected a list of {{"role", "content"}} texts')
        return with_system(messages, self.task.system)

    def _row(self, where: str, fields: Mapping[str, Any], prompt: Prompt) -> Row:
        answer = self._answer_format.fill(where, fields)
        solution = self._solution_format
        return Row(
            index=0,
            prompt_id=prompt_id(self.name, prompt),
            task=self.name,
            prompt=prompt,
            answer=json.dumps({"answer": answer, "row": fields}, ensure_ascii=False),
            solution=None if solution is None else solution.fill(where, fields),
            chat=self.task.chat,
            where=where,
        )


class ReasoningGymRows:
    """`size` rows of a procedural data set, each made when it is asked for (some data sets need 0.2 s a row). Its
    held-out pool is the first `held_out` distinct prompts; a training row that would repeat one of those is replaced
    by the next row that does not. Rows may repeat each other: that is the data set's own distribution."""

    def __init__(self, task: ReasoningGymTask, name: str) -> None:
        self.task, self.name = task, name
        self._prompt_format = Format(task.prompt, f"task {name}: prompt")
        self._solution_format = Format(task.solution, f"task {name}: solution")
        self._data = reasoning_gym_data(task)
        self._excluded: frozenset[str] = frozenset()
        self.pool = self._pool()

    def exclude(self, keys: frozenset[str]) -> None:
        """Training rows no longer hold these prompts. Raises `TaskError` when nothing is left."""
        self._excluded = keys
        self[0]

    def __len__(self) -> int:
        return self.task.size

    def __getitem__(self, index: int) -> Row:
        for step in range(len(self)):
            row = self._make((index + step) % len(self))
            if row.key not in self._excluded:
                return row
        raise TaskError(
            f"{self.name}: all {len(self)} rows repeat a held-out prompt; none is left to train (held_out = {self.task.held_out})"
        )

    def _pool(self) -> list[Row]:
        pool: dict[str, Row] = {}
        for index in range(len(self)):
            if len(pool) == self.task.held_out:
                break
            row = self._make(index)
            pool.setdefault(row.key, row)
        if len(pool) < self.task.held_out:
            raise TaskError(
                f"{self.name}: held_out = {self.task.held_out}, but its {len(self)} rows have {len(pool)} distinct prompts"
            )
        return list(pool.values())

    def _make(self, index: int) -> Row:
        where = f"{self.name}[{index}]"
        entry = plain({key: self._data[index][key] for key in ("question", "answer", "metadata")})
        prompt = with_system(_text(self._prompt_format, where, entry), self.task.system)
        return Row(
            index=index,
            prompt_id=prompt_id(self.name, prompt),
            task=self.name,
            prompt=prompt,
            answer=json.dumps(entry, ensure_ascii=False),
            solution=None if entry["answer"] is None else self._solution_format.fill(where, entry),
            chat=self.task.chat,
            where=where,
        )


def reasoning_gym_data(task: ReasoningGymTask) -> Any:
    """The procedural data set of a task. Raises `TaskError` for a name or a parameter that it does not have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dependency's invalid escape sequences
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    where = f"reasoning-gym data set {task.dataset!r}"
    if task.dataset not in DATASETS:
        near = get_close_matches(task.dataset, DATASETS, n=3) or sorted(DATASETS)
        raise TaskError(f"{where}: there is none of that name; expected one of {', '.join(near)}")
    if reserved := sorted({"size", "seed"} & task.params.keys()):
        raise TaskError(f"{where}: params.{reserved[0]}: set {reserved[0]} beside `dataset`, not in `params`")
    try:
        return reasoning_gym.create_dataset(task.dataset, size=task.size, seed=task.seed, **task.params)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # its configs check themselves with these
        raise TaskError(f"{where}: params {task.params}: {error}") from error


def plain(value: Any) -> Any:
    """The same data in JSON's types: keys as text, tuples and sets as lists, arrays and numpy numbers as Python's, any
    other object as its text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {str(key): plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [plain(entry) for entry in value]
        case set() | frozenset():
            return sorted((plain(entry) for entry in value), key=str)
        case np.ndarray() | np.generic():
            return plain(value.tolist())
    return str(value)


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt with the system message before it, unless it brings its own."""
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages if messages[0]["role"] == "system" else [{"role": "system", "content": system}, *messages]


def prompt_id(task: str, prompt: Prompt) -> str:
    """16 hex digits, the same in every process."""
    return xxhash.xxh3_64_hexdigest(f"{task}\0{prompt_key(prompt)}".encode())


def _text(prompt: Format, where: str, fields: Mapping[str, Any]) -> str:
    text = prompt.fill(where, fields)
    if not text.strip():
        raise TaskError(f"{where}: prompt: got an empty text")
    return text
