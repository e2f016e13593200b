"""The closing report: its numbers follow from the log and from nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from engine.config import Config, parse_config
from protocols import messages as m
from protocols.log import GroupRow, Log
from workers.measure import Lag, measure, online_seconds, overlap, union
from workers.metrics import MetricsWriter
from workers.report import report

CONFIG = {
    "name": "trial", "steps": 3, "model": {"type": "path", "path": "m"}, "objective": {"type": "dapo"},
    "tasks": [{"type": "jsonl", "path": "rows.jsonl"}], "learner": {"lr": 1.0},
    "buffer": {"groups_per_step": 1, "samples_per_group": 2, "max_lag": 1}, "generator": {"sampling": {"max_tokens": 9}},
}  # fmt: skip
INTERVALS = st.lists(st.tuples(st.floats(0, 50), st.floats(0.5, 20)), min_size=1, max_size=8)


def config() -> Config:
    return parse_config(CONFIG, "trial.toml")


class Story:
    """Writes a log: every group has two samples, one right; times in seconds from 1000."""

    def __init__(self, folder: Path) -> None:
        self.log = Log.create(folder / "rollouts.db", run="trial", config=CONFIG, code_version="1")
        self.next = 0

    def group(
        self, kind: str, spans: list[tuple[float, float]], versions: list[tuple[int, int]], worker: str = "g"
    ) -> int:
        group, self.next = self.next, self.next + 1
        step = versions[0][0]
        self.log.add_group(
            GroupRow(
                group=group, kind=kind, source_index=group, task="t", prompt_id=str(group), prompt=np.ones(3, m.INT),
                prompt_text="?", answer="{}", samples=len(spans), seed=0, min_version=step, issued_at=1000.0,
            )  # type: ignore[arg-type]
        )  # fmt: skip
        tokens = sum(count for _, count in versions)
        for sample, (start, end) in enumerate(spans):
            rollout = m.Rollout(
                group=group, sample=sample, fence=1, tokens=np.ones(tokens, m.INT), versions=versions, finish="stop",
                logprobs=np.zeros(tokens, m.FLOAT), text="", started_at=1000 + start, finished_at=1000 + end,
            )  # fmt: skip
            self.log.add_rollout(worker, rollout, 1000 + end)
            grade = m.Grade(group=group, sample=sample, attempt=0, verdict="graded", correct=sample == 0, seconds=0.5)
            self.log.add_grade("r", grade, 1000 + end)
        return group

    def train(self, step: int, group: int, start: float, end: float) -> None:
        self.log.add_plan(step, [group])
        figures = {"train_s": end - start, "wait_s": 1.0, "publish_s": 0.25}
        self.log.commit_step(m.StepCommit(step, "h", "1", 1000 + start, 1000 + end, figures))

    def event(self, at: float, kind: str, worker: str) -> None:
        self.log.add_event(kind, worker, "", 1000 + at)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Two steps trained from 10 to 20 and 30 to 40; one group dropped; evaluations of weights 0 and 2."""
    story = Story(tmp_path)
    story.event(0, "joined", "g")
    story.event(0, "joined", "r")
    before = story.group("eval", [(0, 2), (0, 2)], [(0, 2)])
    story.log.set_group(before, "evaluated")
    first = story.group("train", [(0, 10), (0, 10)], [(0, 10)])
    story.train(1, first, 10, 20)
    dropped = story.group("train", [(10, 20), (10, 20)], [(0, 10)])
    story.log.set_group(dropped, "dropped", reason="all wrong")
    second = story.group("train", [(15, 25), (25, 35)], [(0, 2), (1, 8)])
    story.train(2, second, 30, 40)
    after = story.group("eval", [(40, 42), (40, 42)], [(2, 3)])
    story.log.set_group(after, "evaluated")
    story.event(50, "left", "g")
    story.event(60, "left", "r")
    story.log.commit()
    story.log.close()
    return tmp_path


def test_counts_accuracy_and_lag(run_dir: Path) -> None:
    with Log.open(run_dir / "rollouts.db") as log:
        found = measure(log)
    assert (found.steps, found.of_steps) == (2, 3)
    assert found.groups == {"trained": 2, "dropped": 1}
    assert found.samples == {"trained": 4, "dropped": 2}
    assert found.tokens == {"trained": 40, "dropped": 20, "evaluated": 10}
    assert found.keep_rate == pytest.approx(2 / 3)
    assert [(e.step, e.accuracy, e.prompts, e.samples, e.version_min, e.version_max) for e in found.evaluations] == [
        (0, 0.5, 1, 2, 0, 0), (2, 0.5, 1, 2, 2, 2),
    ]  # fmt: skip
    # Step 1 trains version 0 on tokens of version 0; step 2 trains version 1 on 2 x 2 tokens of version 0, 2 x 8 of 1.
    assert found.lag == Lag(mean=4 / 40, p99=1.0, max=1, masked_fraction=0.0)


def test_overlap_and_time_per_role(run_dir: Path) -> None:
    with Log.open(run_dir / "rollouts.db") as log:
        found = measure(log)
    # Training from 10 to 20 and 30 to 40. Of the six training responses of 10 tokens: none of the first two, all of the
    # dropped two, half of 15 to 25, half of 25 to 35.
    assert found.overlap is not None
    assert found.overlap.sampled_while_training == pytest.approx(30 / 60)
    # Sampling from 0 to 35 covers 10 of the first and 5 of the second.
    assert found.overlap.trained_while_sampling == pytest.approx(15 / 20)
    learner, generator, reward = found.roles
    assert learner.parts == pytest.approx({"train": 20.0, "wait": 2.0, "publish": 0.5})
    assert (generator.name, generator.online_s, generator.busy_s, generator.tokens) == ("g", 50.0, 37.0, 70)
    assert (reward.name, reward.online_s, reward.busy_s) == ("r", 60.0, pytest.approx(5.0))


def test_lag_beyond_the_bound_counts_as_masked(tmp_path: Path) -> None:
    story = Story(tmp_path)
    for step in (1, 2, 3):
        story.train(step, story.group("train", [(0, 1), (0, 1)], [(0, 5)]), step, step + 1)
    with Log.open(tmp_path / "rollouts.db") as log:
        assert measure(log).lag is None, "what is not committed is not there"
    story.log.commit()
    with Log.open(tmp_path / "rollouts.db") as log:
        assert measure(log).lag == Lag(mean=1.0, p99=2.0, max=2, masked_fraction=pytest.approx(1 / 3))
    story.log.close()


@given(sampling=INTERVALS, training=INTERVALS)
def test_overlap_is_what_counting_small_slices_gives(
    sampling: list[tuple[float, float]], training: list[tuple[float, float]]
) -> None:
    slices = np.arange(0, 75, 0.005) + 0.0025
    busy = np.any([(slices > a) & (slices < a + d) for a, d in training], axis=0)
    active = np.any([(slices > a) & (slices < a + d) for a, d in sampling], axis=0)
    rows = np.array([(a, a + d, 10.0) for a, d in sampling])
    found = overlap(rows, np.array([(a, a + d) for a, d in training]))
    assert found is not None
    inside = [[float(np.sum(busy & (slices > a) & (slices < a + d)) * 0.005), d] for a, d in sampling]
    error = max(0.01 * len(training) / d for _, d in sampling)
    assert found.sampled_while_training == pytest.approx(np.mean([covered / d for covered, d in inside]), abs=error)
    slack = 0.01 * (len(training) + len(sampling)) / (np.sum(busy) * 0.005)
    assert found.trained_while_sampling == pytest.approx(np.sum(busy & active) / np.sum(busy), abs=slack)
    assert 0 <= found.sampled_while_training <= 1 + 1e-6
    assert 0 <= found.trained_while_sampling <= 1 + 1e-6


@given(INTERVALS)
def test_a_union_is_disjoint_and_in_order(intervals: list[tuple[float, float]]) -> None:
    merged = union(np.array([(a, a + d) for a, d in intervals]))
    assert np.all(merged[1:, 0] > merged[:-1, 1])
    assert all(any(lo <= a and a + d <= hi for lo, hi in merged.tolist()) for a, d in intervals)


def test_time_online_ends_with_the_last_result_where_nobody_saw_the_end() -> None:
    joins = [(0.0, "joined", "g", ""), (100.0, "joined", "g", ""), (110.0, "left", "g", ""), (0.0, "joined", "x", "")]
    assert online_seconds("g", joins, [("g", 5.0), ("g", 30.0), ("x", 60.0), ("g", 105.0)]) == 30.0 + 10.0
    assert online_seconds("nobody", joins, []) is None


def test_the_report_is_printed_and_written(run_dir: Path) -> None:
    writer = MetricsWriter(run_dir)
    writer.evaluation(0, {"accuracy": 0.25})
    for step in (1, 2):
        writer.step(step, {"accuracy": 0.5, "entropy": float("nan"), "lag_mean": 0.1})
    writer.close()
    out = io.StringIO()
    found = report(run_dir, Console(file=out, width=160))
    text = out.getvalue()
    for expected in (
        "trial: 2 of 3 steps", "0.500 on 1 prompts, 2 samples, weights 2 (+0.000)", "2 groups, 4 samples, 40 tokens",
        "66.7% of decided groups", "mean 0.10, p99 1, max 1", "50.0% of tokens were sampled while the learner trained",
        "train 20.0 s, wait 2.0 s, publish 0.5 s", "sampling 37.0 s (74%), idle 13.0 s", str(run_dir / "report.png"),
    ):  # fmt: skip
        assert expected in text
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_dir / "report.json").read_text()) == msgspec.to_builtins(found)


def test_a_run_that_has_done_nothing_yet_can_be_reported(tmp_path: Path) -> None:
    Log.create(tmp_path / "rollouts.db", run="trial", config=CONFIG, code_version="1").close()
    found = report(tmp_path, Console(file=io.StringIO()))
    assert (found.steps, found.evaluations, found.lag, found.overlap) == (0, [], None, None)


def test_documents_and_what_packing_saves(tmp_path: Path) -> None:
    story = Story(tmp_path)
    for version in (0, 1):
        group = story.group("eval", [], [(version, 2)])
        for sample, parts in enumerate([
            {"parsed": 1.0, "labelled": 1.0, "label_f1": 0.5 + version / 2, "utel_f1": 0.5, "reading_f1": 0.8, "labels_missed": 1.0},
            {"parsed": 0.0, "labelled": 0.0, "utel_f1": 0.0},
        ]):  # fmt: skip
            rollout = m.Rollout(
                group=group, sample=sample, fence=1, tokens=np.ones(2, m.INT), versions=[(version, 2)], finish="stop",
                logprobs=np.zeros(2, m.FLOAT), text="", started_at=1000.0, finished_at=1001.0,
            )  # fmt: skip
            story.log.add_rollout("g", rollout, 1001.0)
            grade = m.Grade(
                group=group, sample=sample, attempt=0, verdict="graded", correct=False, parts=parts, seconds=0.1
            )
            story.log.add_grade("r", grade, 1001.0)
        story.log.set_group(group, "evaluated")
    for step, saved in ((1, 0.7), (2, 0.8)):
        story.log.add_plan(step, [story.group("train", [(0, 1)], [(0, 2)])])
        story.log.commit_step(m.StepCommit(step, "h", "1", 1000.0, 1001.0, {"prompt_tokens_saved": saved}))
    found = measure(story.log)
    story.log.commit()
    story.log.close()
    assert found.prompt_tokens_saved == pytest.approx(0.75)
    assert [(one.step, one.label_f1, one.utel_f1, one.divergence) for one in found.documents] == [
        (0, 0.5, 0.25, 0.0), (1, 1.0, 0.25, 0.5)
    ]  # fmt: skip
    assert [(one.reading_f1, one.parsed, one.labels_missed) for one in found.documents] == [(0.8, 0.5, 1)] * 2
    out = io.StringIO()
    report(tmp_path, Console(file=out, width=200))
    assert (
        "field F1 1.000 by labels; field F1 0.250 by UTel's reading; which differ by 0.500 a response" in out.getvalue()
    )
    assert "saves 75.0% of the learner's input tokens" in out.getvalue()
