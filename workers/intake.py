"""What enters the buffer: rows of the tasks become groups of the log, with their prompts as tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np

from engine.config import Config, ConfigError, SftObjective, policy_folder
from engine.tasks import Row, Source
from engine.text import TextModel
from protocols import messages as m
from protocols.log import GroupRow, Kind

SKIPS_IN_A_ROW = 10_000
"""So many prompts in a row that are too long mean that none will come that is not."""


class Intake:
    """The stream of training groups from `cursor` on, and the held-out groups of an evaluation."""

    def __init__(self, config: Config) -> None:
        """Reads the data. Raises `TaskError` or `ConfigError` for a file or a row that cannot be used."""
        self.config = config
        self.text = TextModel.load(policy_folder(config))
        self.source = Source(config.tasks, config.seed)
        self.kind: Kind = "ready" if isinstance(config.objective, SftObjective) else "train"
        evaluates = self.kind == "train" and config.eval.prompts > 0
        self.cursor = 0
        self.skipped: list[str] = []
        """What was left out since the owner last looked, as messages."""
        held_out = self.source.held_out(config.eval.prompts) if evaluates else []
        self.held_out = [row for row in held_out if self._prompt(row) is not None]
        if held_out and not self.held_out:
            raise ConfigError(
                f"eval.prompts = {config.eval.prompts}: every held-out prompt was skipped, the last one as "
                f"{self.skipped[-1]}"
            )

    def train(self, group: int, *, min_version: int) -> tuple[GroupRow, m.Rollout | None]:
        """The next training group, and its response where the row brings one (supervised fine-tuning). Raises
        `ConfigError` when nothing but prompts that are too long comes."""
        for _ in range(SKIPS_IN_A_ROW):
            row = self.source[self.cursor]
            self.cursor += 1
            prompt = self._prompt(row)
            if prompt is None:
                continue
            samples = self.config.buffer.samples_per_group if self.kind == "train" else 1
            entry = self._group(group, row, prompt, self.kind, samples, min_version, self.cursor - 1)
            return entry, self._solution(group, row) if self.kind == "ready" else None
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

    def _prompt(self, row: Row) -> np.ndarray | None:
        """The row's prompt tokens; None when it is too long and such prompts are to be skipped."""
        limit = self.config.buffer.prompt_tokens
        tokens = self.text.encode_prompt(row.prompt, chat=row.chat)
        if 0 < tokens.shape[0] <= limit:
            return tokens
        problem = f"{row.where}: the prompt has {tokens.shape[0]} tokens, expected 1 to {limit} (buffer.prompt_tokens)"
        if self.config.buffer.long_prompts == "error":
            raise ConfigError(f'{problem}; set buffer.long_prompts = "skip" to leave such rows out')
        self.skipped.append(problem)
        return None

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
            prompt_text=row.prompt if isinstance(row.prompt, str) else msgspec.json.encode(row.prompt).decode(),
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
