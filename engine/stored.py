"""Groups of stored logs as training data: found once, read one at a time, never held. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from msgspec import Struct

from engine.config import LogTask
from engine.fields import TaskError
from engine.text import TextModel
from protocols.log import GroupRow, Log, LogError
from protocols.messages import Grade, Rollout

PAGE_ROWS = 4096
SAMPLED_GROUPS = 16
"""Of each log, read when a run starts, to see whether their tokens are this model's."""

_GRADED = """SELECT g.id, g.status, g.samples, count(*), sum(f.correct), p.text FROM groups AS g
    JOIN prompts AS p ON p.group_id = g.id JOIN final_grades AS f ON f.group_id = g.id AND f.verdict = 'graded'
    WHERE g.kind IN ('train', 'ready') AND g.status IN (SELECT value FROM json_each(?)) AND g.id > ?
    GROUP BY g.id ORDER BY g.id LIMIT ?"""


class StoredGroup(Struct, frozen=True, eq=False):
    """A group of an earlier run: its graded responses in sample order, each with the grade that counts."""

    run: str
    where: str
    row: GroupRow
    rollouts: list[Rollout]
    grades: list[Grade]


class LogRows:
    """The groups of a task's logs that can be trained on."""

    def __init__(self, task: LogTask, *, without: frozenset[str]) -> None:
        """Raises `TaskError` for a log that is not there or cannot be used, and when nothing in them fits."""
        paths = [task.path] if isinstance(task.path, str) else task.path
        if not paths:
            raise TaskError("task log: path: got none, expected at least one log")
        self._logs: list[Log] = []
        try:
            self._logs += (Log.open_still(log_file(path)) for path in paths)
            self._runs = [log.meta.run for log in self._logs]
            found = [(number, group) for number, log in enumerate(self._logs) for group in _found(log, task, without)]
        except LogError as error:
            self.close()
            raise TaskError(str(error)) from error
        if not found:
            self.close()
            wanted = f"status {' or '.join(task.status)}" + ", neither all right nor all wrong" * task.dynamic_sampling
            raise TaskError(f"{', '.join(map(str, paths))}: no group to train on; looked for {wanted}")
        self._places = np.array(found, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> StoredGroup:
        """Raises `TaskError` when the log is damaged."""
        number, group = map(int, self._places[index])
        log = self._logs[number]
        try:
            row, rollouts = log.group(group), {rollout.sample: rollout for rollout in log.rollouts(group)}
            grades = {grade.sample: grade for grade in log.grades(group) if grade.verdict == "graded"}
        except LogError as error:
            raise TaskError(str(error)) from error
        where = f"{log.path}: group {group}"
        if row is None or not grades.keys() <= rollouts.keys():
            raise TaskError(f"{where}: not whole any more; expected the log as it was when the run started")
        graded = sorted(grades)
        return StoredGroup(
            run=self._runs[number],
            where=where,
            row=row,
            rollouts=[rollouts[sample] for sample in graded],
            grades=[grades[sample] for sample in graded],
        )

    def check(self, text: TextModel, vocabulary: int) -> None:
        """Looks at some groups of every log. Raises `TaskError` when their tokens are not of this model."""
        for number in range(len(self._logs)):
            own = np.flatnonzero(self._places[:, 0] == number)
            for place in np.unique(own[np.linspace(0, len(own) - 1, SAMPLED_GROUPS).astype(int)]) if len(own) else ():
                stored = self[int(place)]
                check_vocabulary(stored, vocabulary)
                _check_text(stored, text)

    def close(self) -> None:
        for log in self._logs:
            log.close()


def log_file(path: str | Path) -> Path:
    """The log that is meant by the path of a run's folder, or by its own."""
    return Path(path) / "rollouts.db" if Path(path).is_dir() else Path(path)


def check_vocabulary(stored: StoredGroup, vocabulary: int) -> None:
    """Raises `TaskError` for a token that the model does not have."""
    for tokens in (stored.row.prompt, *(rollout.tokens for rollout in stored.rollouts)):
        if tokens.size and int(tokens.max()) >= vocabulary:
            raise TaskError(
                f"{stored.where} of run {stored.run} has token {int(tokens.max())}, the model's vocabulary ends at "
                f"{vocabulary - 1}: it was made with another model"
            )


def _check_text(stored: StoredGroup, text: TextModel) -> None:
    """Responses that a generator decoded must decode to the same here."""
    for rollout in stored.rollouts if stored.row.kind == "train" else []:
        here = text.decode(rollout.tokens)
        if here != rollout.text:
            raise TaskError(
                f"{stored.where} of run {stored.run}, sample {rollout.sample}: its tokens are {here[:60]!r} in the tokenizer "
                f"of {text.folder}, the log has {rollout.text[:60]!r}: it was made with another tokenizer"
            )


def _found(log: Log, task: LogTask, without: frozenset[str]) -> Iterator[int]:
    last = -1
    statuses = "[" + ", ".join(f'"{status}"' for status in task.status) + "]"
    while page := log.query(_GRADED, statuses, last, PAGE_ROWS):
        last = page[-1][0]
        for group, status, samples, graded, right, text in page:
            complete = graded == samples or (status != "waiting" and graded >= min(2, samples))
            informative = 0 < right < graded or not task.dynamic_sampling
            if complete and informative and text not in without:
                yield group
