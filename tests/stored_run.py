"""Rows for tests that need a log: short prompts, random responses, no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from protocols import messages as m
from protocols.log import GroupRow, Kind, Log


def group_row(group: int, *, kind: Kind = "train", samples: int = 2, min_version: int = 0) -> GroupRow:
    return GroupRow(
        group=group, kind=kind, source_index=group, task="sums", prompt_id=f"sums-{group}",
        prompt=np.arange(3 + group % 4, dtype=m.INT), prompt_text=f"{group} + 1 =", answer=f'{{"answer": "{group + 1}"}}',
        samples=samples, seed=7 * group, min_version=min_version, issued_at=1000.0 + group,
    )  # fmt: skip


def rollout(
    group: int, sample: int, *, tokens: int = 5, fence: int = 1, version: int = 0, text: str = "4"
) -> m.Rollout:
    rng = np.random.default_rng([group, sample, tokens])
    runs = [(version, tokens)] if tokens < 3 else [(version, tokens - 2), (version + 1, 2)]
    return m.Rollout(
        group=group, sample=sample, fence=fence, tokens=rng.integers(0, 150_000, tokens).astype(m.INT),
        logprobs=-rng.random(tokens).astype(m.FLOAT), versions=runs, finish="length" if tokens > 8 else "stop",
        text=text, started_at=1001.0, finished_at=1002.0 + sample,
    )  # fmt: skip


def grade(group: int, sample: int, *, attempt: int = 0, verdict: m.Verdict = "graded", correct: bool = True) -> m.Grade:
    return m.Grade(
        group=group, sample=sample, attempt=attempt, verdict=verdict, correct=correct,
        reward=1.0 if correct else -1.5, parts={"right": float(correct)}, detail="" if correct else "expected 5",
        seconds=0.01,
    )  # fmt: skip


def step_commit(step: int, **metrics: float) -> m.StepCommit:
    return m.StepCommit(
        step=step,
        weights_hash=f"hash-{step}",
        code_version="0.1.0",
        started_at=1010.0,
        finished_at=1012.5,
        metrics=metrics,
        fingerprints={"weight": f"print-{step}"},
    )


def new_log(folder: Path, config: dict[str, Any] | None = None) -> Log:
    folder.mkdir(parents=True, exist_ok=True)
    return Log.create(folder / "rollouts.db", run="trial", config=config or {"steps": 2}, code_version="0.1.0")


def fill_group(log: Log, group: int, rights: list[bool], *, kind: Kind = "train", min_version: int = 0) -> None:
    """A group whose samples are all generated and graded, sample i of 4 + i tokens."""
    log.add_group(group_row(group, kind=kind, samples=len(rights), min_version=min_version))
    for sample, right in enumerate(rights):
        log.add_rollout("gen-1", rollout(group, sample, tokens=4 + sample, version=min_version), 1003.0)
        log.add_grade("reward-1", grade(group, sample, correct=right), 1004.0)


def small_run(folder: Path) -> None:
    """Two steps of two groups (the second only planned), one dropped, one failed, one in flight, one evaluation."""
    with new_log(folder) as log:
        log.add_event("joined", "gen-1", "generator pid 3 on here", 1000.0)
        fill_group(log, 0, [True, False], kind="eval")
        log.set_group(0, "evaluated")
        for group in range(1, 5):
            fill_group(log, group, [True, False], min_version=group // 3)
        log.add_plan(1, [2, 1])
        log.commit_step(step_commit(1, loss=0.25, wait_s=1.5, accuracy=0.5))
        log.add_plan(2, [3, 4])
        fill_group(log, 5, [False, False])
        log.set_group(5, "dropped", reason="all wrong")
        log.add_group(group_row(6))
        for sample in range(2):
            log.add_rollout("gen-2", rollout(6, sample, text="[bold]no markup"), 1003.0)
            log.add_grade("reward-1", grade(6, sample, verdict="timeout", correct=False), 1004.0)
        log.set_group(6, "failed", reason="2 of 2 samples could not be graded")
        log.add_group(group_row(7, samples=3))
        log.add_rollout("gen-1", rollout(7, 2, tokens=20, text="still [red]going"), 1005.0)
        log.add_rollout("gen-1", rollout(7, 0), 1005.0)
        log.add_grade("reward-1", grade(7, 0, verdict="crash", correct=False), 1005.0)
        log.add_grade("reward-2", grade(7, 0, attempt=1), 1006.0)
        log.commit()
