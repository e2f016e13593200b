"""An experiment's table for the terminal, and its curves as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from tools.experiments.figures import Curve, Measured, Spread, Summary, over_seeds

SMOOTH = 9
"""Training steps that a point of a training curve is the mean of."""


def table(title: str, found: Sequence[Summary]) -> Table:
    """One row an arm: mean over seeds, plus or minus their standard deviation; accuracies in percent. `gain` is the end against the
    arm above, paired by seed."""
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    made.add_column("arm", no_wrap=True)
    for name in ("seeds", "start", "end", "gain", "best", "length", "entropy", "Mtokens", "minutes"):
        made.add_column(name, no_wrap=True, justify="right")
    for arm in found:
        made.add_row(
            Text(arm.arm, style="bold"),
            str(len(arm.seeds)),
            number(arm.start, scale=100),
            number(arm.end, scale=100),
            "" if arm.gain is None else number(arm.gain, scale=100, signed=True),
            number(arm.best, scale=100),
            number(arm.length, digits=0),
            number(arm.entropy, digits=3),
            f"{arm.generated_tokens.mean / 1e6:.2f}",
            f"{arm.seconds.mean / 60:.1f}",
        )
    return made


def number(spread: Spread, *, scale: float = 1.0, digits: int = 1, signed: bool = False) -> str:
    """`61.2 ± 2.1`, or the mean alone for one seed."""
    mean = f"{spread.mean * scale:{'+' if signed else ''}.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.deviation * scale:.{digits}f}"


def draw(title: str, arms: Sequence[tuple[str, Sequence[Measured]]], path: Path) -> None:
    """Writes a PNG: accuracy, entropy and length against the step, a line an arm, a band of one deviation over seeds."""
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    accuracy, entropy, length = figure.subplots(1, 3)
    for name, runs in arms:
        if not runs:
            continue
        label = f"{name} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        _band(accuracy, [run.accuracy for run in runs], label, marker="o")
        _band(entropy, [smoothed(run.entropy) for run in runs], label)
        _band(length, [smoothed(run.trained_length) for run in runs], label)
    for axes, text in (
        (accuracy, "held-out accuracy"),
        (entropy, f"entropy (nats), mean of {SMOOTH} steps"),
        (length, f"trained responses' tokens, mean of {SMOOTH} steps"),
    ):
        axes.set_title(text)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    if accuracy.lines:
        accuracy.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=110)


def smoothed(curve: Curve) -> Curve:
    """Each value the mean of the `SMOOTH` around it, fewer at the ends."""
    values, half = np.array(curve.values), SMOOTH // 2
    means = [float(values[max(0, i - half) : i + half + 1].mean()) for i in range(len(values))]
    return Curve(curve.steps, means)


def _band(axes: Axes, curves: Sequence[Curve], label: str, *, marker: str = "") -> None:
    points = over_seeds(curves)
    steps = np.array([step for step, _ in points])
    means = np.array([spread.mean for _, spread in points])
    deviations = np.array([spread.deviation or 0.0 for _, spread in points])
    (line,) = axes.plot(steps, means, marker=marker, markersize=4, linewidth=1.5, label=label)
    axes.fill_between(steps, means - deviations, means + deviations, color=line.get_color(), alpha=0.15, linewidth=0)
