"""What the runs of an experiment measured: one summary an arm, over its seeds, and one curve a figure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from workers.metrics import read_metrics

LAST_STEPS = 10
"""Figures of training steps at the end are means over this many."""


class Curve(Struct, frozen=True):
    """A figure against the policy's step."""

    steps: list[int]
    values: list[float]


class Measured(Struct, frozen=True):
    """One finished run. `accuracy` and `length` are of the held-out evaluations, `entropy` and `trained_length` of the
    training steps; `generated_tokens` is what the whole run sampled for training, dropped groups included."""

    seed: int
    command: str
    folder: str
    accuracy: Curve
    length: Curve
    entropy: Curve
    trained_length: Curve
    generated_tokens: float
    seconds: float


class Spread(Struct, frozen=True):
    """Mean over seeds, and the seeds' sample standard deviation (None for one seed)."""

    mean: float
    deviation: float | None


class Summary(Struct, frozen=True):
    """An arm over its seeds; `gain` is the end's difference to the arm above, paired by seed (same order of prompts)."""

    arm: str
    changes: str
    seeds: list[int]
    start: Spread
    end: Spread
    best: Spread
    length: Spread
    entropy: Spread
    gain: Spread | None
    generated_tokens: Spread
    seconds: Spread


def measured(run_dir: Path, *, seed: int, command: str) -> Measured:
    """The figures of a finished run. Raises `MetricsError`, and `ValueError` when there is no evaluation."""
    history = read_metrics(run_dir)
    if not history.evals or not history.steps:
        raise ValueError(
            f"{run_dir}: {len(history.steps)} steps and {len(history.evals)} evaluations, expected at least one of each"
        )
    return Measured(
        seed=seed,
        command=command,
        folder=str(run_dir),
        accuracy=_curve(history.evals, "eval_step", "accuracy"),
        length=_curve(history.evals, "eval_step", "length_mean"),
        entropy=_curve(history.steps, "step", "entropy"),
        trained_length=_curve(history.steps, "step", "length_mean"),
        generated_tokens=float(history.steps[-1]["total_tokens"]),
        seconds=history.evals[-1]["time"] - history.evals[0]["time"],
    )


def summarize(arms: Sequence[tuple[str, str, list[Measured]]]) -> list[Summary]:
    """One summary an arm that has runs; `arms` are name, what it changes, and its runs. Arms without runs are left out,
    and the gain is then against the nearest arm above that has some."""
    found: list[Summary] = []
    above: list[Measured] = []
    for name, changes, runs in arms:
        if not runs:
            continue
        found.append(
            Summary(
                arm=name,
                changes=changes,
                seeds=[run.seed for run in runs],
                start=spread([run.accuracy.values[0] for run in runs]),
                end=spread([run.accuracy.values[-1] for run in runs]),
                best=spread([max(run.accuracy.values) for run in runs]),
                length=spread([run.length.values[-1] for run in runs]),
                entropy=spread([_end(run.entropy) for run in runs]),
                gain=_gain(runs, above),
                generated_tokens=spread([run.generated_tokens for run in runs]),
                seconds=spread([run.seconds for run in runs]),
            )
        )
        above = runs
    return found


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def over_seeds(curves: Sequence[Curve]) -> list[tuple[int, Spread]]:
    """At every step that some curve has, the spread over those that have it."""
    at: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve.steps, curve.values, strict=True):
            at.setdefault(step, []).append(value)
    return [(step, spread(values)) for step, values in sorted(at.items())]


def _gain(runs: Sequence[Measured], above: Sequence[Measured]) -> Spread | None:
    ends = {run.seed: run.accuracy.values[-1] for run in above}
    pairs = [run.accuracy.values[-1] - ends[run.seed] for run in runs if run.seed in ends]
    return spread(pairs) if pairs else None


def _end(curve: Curve) -> float:
    return statistics.fmean(curve.values[-LAST_STEPS:])


def _curve(rows: Sequence[dict[str, Any]], x: str, y: str) -> Curve:
    points = [(int(row[x]), float(row[y])) for row in rows if row.get(y) is not None]
    return Curve([step for step, _ in points], [value for _, value in points])
