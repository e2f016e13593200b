"""`headrace compare`: two runs step by step, from their logs: a table, what it comes to, and the curves one over the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from protocols.log import LogError
from workers.replay_source import ReplayError, StoredRun

METRICS = (
    "loss", "accuracy", "reward_mean", "length_mean", "entropy", "grad_norm", "clip_fraction_high", "clip_fraction_low",
    "kl_behaviour", "weight_capped_fraction", "lag_mean", "masked_fraction", "value_loss", "explained_variance", "lr",
)  # fmt: skip
"""In this order, as far as both runs have them."""
ROWS = 20
PAIR_WIDTH = 24
"""Columns of a terminal for one metric of both runs."""


class Series(Struct, frozen=True):
    """What is compared of a run: by step its metrics (not finite ones left out) and its weights' hash; evaluations."""

    name: str
    folder: Path
    metrics: dict[int, dict[str, float]]
    hashes: dict[int, str]
    evaluations: dict[int, float]
    config: dict[str, Any]


def compare(first: str, second: str, picture: str | None, console: Console) -> None:
    """Prints how two runs differ and draws their curves. Raises `ReplayError` for runs that cannot be compared."""
    runs = read(first), read(second)
    steps = sorted(runs[0].metrics.keys() & runs[1].metrics.keys())
    if not steps:
        raise ReplayError(
            f"compare: no step in common: {first} has {len(runs[0].metrics)} steps, {second} has {len(runs[1].metrics)}"
        )
    names = [name for name in METRICS if all(any(name in row for row in run.metrics.values()) for run in runs)]
    wide = max(1, (console.width - 6) // PAIR_WIDTH)
    for place in range(0, len(names), wide):
        console.print(_table(runs, spread(steps, ROWS), names[place : place + wide]))
    console.print(_differences(runs, steps, names))
    for line in [_first_difference(runs, steps), *_lengths(runs), *_evaluations(runs), *_settings(runs)]:
        console.print(Text(line), soft_wrap=True)
    path = Path(picture) if picture is not None else runs[1].folder / "compare.png"
    draw(runs, names, path)
    console.print(Text(f"curves: {path}"), soft_wrap=True)


def read(run: str) -> Series:
    """The figures of a run's committed steps. Raises `ReplayError`."""
    with StoredRun.open(run) as stored:
        try:
            rows = list(stored.log.steps())
            return Series(
                name=stored.folder.name,
                folder=stored.folder,
                metrics={row.step: {k: v for k, v in row.metrics.items() if math.isfinite(v)} for row in rows},
                hashes={row.step: row.weights_hash for row in rows},
                evaluations={int(e["eval_step"]): e["accuracy"] for e in stored.log.evaluations()},
                config=dict(flat(stored.meta.config)),
            )
        except LogError as error:
            raise ReplayError(str(error)) from error


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the last one among them."""
    places = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    return [steps[place] for place in places.tolist()]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values of nested tables and lists."""
    match value:
        case dict() if value:
            for key, entry in value.items():
                yield from flat(entry, f"{path}.{key}" if path else str(key))
        case list() if value:
            for index, entry in enumerate(value):
                yield from flat(entry, f"{path}.{index}")
        case _:
            yield path, value


# --- what is printed -------------------------------------------------------------------------------------------------


def _table(runs: tuple[Series, Series], steps: Sequence[int], names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    for name in names:
        for label, run in zip("AB", runs, strict=True):
            table.add_column(f"{name.replace('_fraction', '')}\n{label} {run.name:.10}", justify="right")
    for step in steps:
        figures = [_figure(run.metrics[step].get(name)) for name in names for run in runs]
        table.add_row(str(step), *figures)
    return table


def _differences(runs: tuple[Series, Series], steps: Sequence[int], names: Sequence[str]) -> Table:
    table = Table(
        title=Text(f"B {runs[1].name} minus A {runs[0].name}, over {len(steps)} steps"), box=None, pad_edge=False
    )
    for column in ("metric", "mean A", "mean B", "mean difference", "largest", "at step"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in names:
        both = [step for step in steps if all(name in run.metrics[step] for run in runs)]
        if not both:
            continue
        a, b = (np.array([run.metrics[step][name] for step in both]) for run in runs)
        most = int(np.abs(b - a).argmax())
        figures = (a.mean(), b.mean(), (b - a).mean(), (b - a)[most])
        table.add_row(name, *(_figure(float(figure)) for figure in figures), str(both[most]))
    return table


def _first_difference(runs: tuple[Series, Series], steps: Sequence[int]) -> str:
    odd = next((step for step in steps if runs[0].hashes[step] != runs[1].hashes[step]), None)
    if odd is None:
        return f"weights: equal after every one of {len(steps)} steps"
    return f"weights: step {odd} is the first whose hashes differ: A {runs[0].hashes[odd]}, B {runs[1].hashes[odd]}"


def _lengths(runs: tuple[Series, Series]) -> Iterator[str]:
    a, b = (len(run.metrics) for run in runs)
    if a != b:
        yield f"steps: A has {a}, B has {b}; only those that both have are compared"


def _evaluations(runs: tuple[Series, Series]) -> Iterator[str]:
    for step in sorted(runs[0].evaluations.keys() | runs[1].evaluations.keys()):
        a, b = (run.evaluations.get(step) for run in runs)
        yield f"held-out accuracy after step {step}: A {_figure(a) or 'not measured'}, B {_figure(b) or 'not measured'}"


def _settings(runs: tuple[Series, Series]) -> Iterator[str]:
    a, b = (run.config for run in runs)
    for key in a | b:
        if a.get(key) != b.get(key) and key not in ("name", "runs"):
            yield f"config {key}: A {a.get(key, 'not set')!r}, B {b.get(key, 'not set')!r}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# --- the picture -----------------------------------------------------------------------------------------------------


def draw(runs: tuple[Series, Series], names: Sequence[str], path: Path) -> None:
    """Writes a PNG with one panel a metric and both runs in it. Raises `ReplayError` when it cannot be written."""
    columns = min(4, max(1, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"A {runs[0].name}, B {runs[1].name}")
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).ravel(), [*names], strict=False):
        for label, style, color, run in zip("AB", ("-", "--"), ("C0", "C1"), runs, strict=True):
            points = [(step, row[name]) for step, row in sorted(run.metrics.items()) if name in row]
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, linewidth=1.3)
            if name == "accuracy" and run.evaluations:
                axes.plot(
                    *zip(*sorted(run.evaluations.items()), strict=True),
                    "o",
                    color=color,
                    label=f"{label} held-out",
                    markersize=4,
                )
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(loc="best", fontsize="small")
    for axes in figure.axes[len(names) :]:
        axes.set_axis_off()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ReplayError(f"{path}: cannot be written: {error}") from error
