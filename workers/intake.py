"""What enters the buffer: rows of the tasks, or groups of stored logs, become groups of the log."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np
from msgspec import Struct

from engine.config import Config, ConfigError, SftObjective
from engine.documents.page_rows import PageText
from engine.documents.readings import Reading
from engine.rows import prompt_text
from engine.start_folder import policy_folder
from engine.stored import StoredGroup, check_vocabulary
from engine.tasks import LogSource, Row, Source, page_tasks, prompt_tasks
from engine.text import TextModel
from protocols import messages as m
from protocols.log import GroupRow, Kind
from workers.model_shape import model_shape

SKIPS_IN_A_ROW = 10_000
"""So many prompts in a row that are too long mean that none will come that is not."""


class Entry(Struct, frozen=True, eq=False):
    """A training group; one that needs no generator comes with its responses and their grades, and says whose they are."""

    row: GroupRow
    origin: str = ""
    rollouts: list[m.Rollout] = []
    grades: list[m.Grade] = []


class Intake:
    """The stream of training groups from `cursor` on, and the held-out groups of an evaluation."""

    def __init__(self, config: Config) -> None:
        """Reads the data. Raises `TaskError` or `ConfigError` for a file or a row that cannot be used."""
        self.config = config
        self.text = PageText() if config.reads_pages else TextModel.load(policy_folder(config))
        solutions = config.reads_pages or isinstance(config.objective, SftObjective)
        self.kind: Kind = "ready" if solutions or config.offline else "train"
        prompts = page_tasks(config.tasks) if config.reads_pages else prompt_tasks(config.tasks)
        self.source = Source(prompts, config.seed) if prompts or not config.offline else None
        self.logs = self._open_logs(self.text) if config.offline and isinstance(self.text, TextModel) else None
        self.cursor = 0
        self.skipped: list[str] = []
        """What was left out since the owner last looked, as messages."""
        evaluates = self.source is not None and config.generator is not None and not solutions
        held_out = self.source.held_out(config.eval.prompts) if self.source is not None and evaluates else []
        self.held_out = [row for row in held_out if self._prompt(row) is not None]
        if held_out and not self.held_out:
            raise ConfigError(
                f"eval.prompts = {config.eval.prompts}: every held-out prompt was skipped, the last one as "
                f"{self.skipped[-1]}"
            )

    @property
    def readings(self) -> list[Reading]:
        """What was met where documents were read."""
        return [] if self.source is None else self.source.readings

    def train(self, group: int, *, min_version: int) -> Entry:
        """The next training group. Raises `ConfigError` when nothing but prompts that are too long comes."""
        for _ in range(SKIPS_IN_A_ROW):
            index, self.cursor = self.cursor, self.cursor + 1
            if self.logs is not None:
                entry = self._stored(group, self.logs[index], min_version, index)
            elif self.source is not None:
                entry = self._issued(group, self.source[index], min_version, index)
            if entry is not None:
                return entry
        raise ConfigError(
            f"tasks: {SKIPS_IN_A_ROW} prompts in a row were skipped, so none is left to train on; the last one as "
            f"{self.skipped[-1]}"
        )

    def evaluation(self, first_group: int, *, step: int) -> Iterator[GroupRow]:
        """The groups that measure the weights after `step` steps on the held-out prompts."""
        group = first_group
        for index, row in enumerate(self.held_out):
            prompt = self._prompt(row)
            if prompt is not None:
                yield self._group(group, row, prompt, "eval", self.config.eval.samples, step, index)
                group += 1

    def _issued(self, group: int, row: Row, min_version: int, index: int) -> Entry | None:
        """A row as a group; None when it is to be skipped."""
        prompt = self._prompt(row)
        if prompt is None:
            return None
        if self.kind == "train":
            return Entry(
                self._group(group, row, prompt, "train", self.config.buffer.samples_per_group, min_version, index)
            )
        entry = self._group(group, row, prompt, "ready", 1, min_version, index)
        grade = m.Grade(group, 0, 0, "graded", correct=True, reward=1.0)
        return Entry(entry, "source", [self._solution(group, row)], [grade])

    def _stored(self, group: int, stored: StoredGroup, min_version: int, index: int) -> Entry | None:
        """A group of another run as one of this run; None when it is to be skipped.

        Its tokens count as sampled by the oldest weights that a group which enters now may have: the versions of another
        run say nothing here. The log-probabilities are those of the weights that did sample them.
        """
        check_vocabulary(stored, self.vocabulary)
        if not self._fits(stored.row.prompt, stored.where):
            return None
        row = msgspec.structs.replace(
            stored.row, group=group, kind="ready", source_index=index, samples=len(stored.rollouts), status="waiting",
            min_version=min_version, issued_at=time.time(), reason=None, step=None,
        )  # fmt: skip
        rollouts = [
            msgspec.structs.replace(
                rollout, group=group, sample=i, fence=0, versions=[(min_version, len(rollout.tokens))]
            )
            for i, rollout in enumerate(stored.rollouts)
        ]
        grades = [
            msgspec.structs.replace(grade, group=group, sample=i, attempt=0) for i, grade in enumerate(stored.grades)
        ]
        return Entry(row, f"{stored.run}:{stored.row.group}", rollouts, grades)

    def _open_logs(self, text: TextModel) -> LogSource:
        """Raises `TaskError` for a log that cannot be used or was made with another model."""
        self.vocabulary = model_shape(self.config).vocabulary
        held_out = (
            frozenset(prompt_text(row.prompt) for row in self.source.pool) if self.source is not None else frozenset()
        )
        logs = LogSource(self.config.tasks, self.config.seed, without=held_out)
        for table in logs.tables:
            table.check(text, self.vocabulary)
        return logs

    def _prompt(self, row: Row) -> np.ndarray | None:
        """The row's prompt tokens; None when it is too long and such prompts are to be skipped."""
        tokens = self.text.encode_prompt(row.prompt, chat=row.chat)
        return tokens if self._fits(tokens, row.where) else None

    def _fits(self, prompt: np.ndarray, where: str) -> bool:
        """False for a prompt that is to be skipped. Raises `ConfigError` for one that is too long and must not be."""
        limit = self.config.buffer.prompt_tokens
        if 0 < prompt.shape[0] <= limit:
            return True
        problem = f"{where}: the prompt has {prompt.shape[0]} tokens, expected 1 to {limit} (buffer.prompt_tokens)"
        if self.config.buffer.long_prompts == "error":
            raise ConfigError(f'{problem}; set buffer.long_prompts = "skip" to leave such rows out')
        self.skipped.append(problem)
        return False

    def _group(
        self, group: int, row: Row, prompt: np.ndarray, kind: Kind, samples: int, min_version: int, source_index: int
    ) -> GroupRow:
        return GroupRow(
            group=group,
            kind=kind,
            source_index=source_index,
            task=row.task,
            prompt_id=row.prompt_id,
            prompt=prompt,
            prompt_text=prompt_text(row.prompt),
            answer=row.answer,
            samples=samples,
            seed=sampling_seed(self.config.seed, group),
            min_version=min_version,
            issued_at=time.time(),
        )

    def _solution(self, group: int, row: Row) -> m.Rollout:
        """The row's solution as a finished rollout of weights 0; its behaviour log-probabilities are not used."""
        if row.solution is None:
            raise ConfigError(f"{row.where}: no solution, but the objective (sft) trains on solutions")
        tokens = np.append(self.text.encode(row.solution), np.int32(self.text.eos)).astype(m.INT)
        size, now = tokens.shape[0], time.time()
        return m.Rollout(
            group=group, sample=0, fence=0, tokens=tokens, logprobs=np.zeros(size, m.FLOAT), versions=[(0, size)],
            finish="stop", text=row.solution, started_at=now, finished_at=now,
        )  # fmt: skip


def sampling_seed(seed: int, group: int) -> int:
    """The seed of a group's draws, a function of (run seed, group): a ticket issued anew draws the same tokens."""
    return (seed * 0x9E3779B97F4A7C15 + group * 0xBF58476D1CE4E5B9 + 1) % (1 << 63)
