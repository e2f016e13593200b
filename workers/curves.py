"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from workers.metrics import History

PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("accuracy", (("accuracy", "train"),)),
    ("reward", (("reward_mean", "mean"),)),
    ("response length (tokens)", (("length_mean", "trained"), ("generated_length_mean", "generated"))),
    ("entropy (nats)", (("entropy", "mean"),)),
    ("lag (versions)", (("lag_mean", "mean"), ("lag_p99", "p99"), ("lag_max", "max"))),
    ("keep rate", (("keep_rate", "recent"), ("keep_rate_total", "all"))),
)
"""Title, and the metrics with their labels, of each panel."""


def draw_curves(history: History, title: str, path: Path) -> None:
    """Writes a PNG with one panel a subject; a metric that a run does not have leaves its panel without that line."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (subject, metrics) in zip(figure.subplots(2, 3).ravel(), PANELS, strict=True):
        for name, label in metrics:
            _line(axes, history.steps, "step", name, label, "-")
        if subject == "accuracy":
            _line(axes, history.evals, "eval_step", "accuracy", "held-out", "o-")
        if subject == "reward":
            _line(axes, history.evals, "eval_step", "reward_mean", "held-out", "o-")
        axes.set_title(subject)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=110)


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str, y: str, label: str, style: str) -> None:
    points = [(row[x], row[y]) for row in rows if row.get(y) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, style, label=label, linewidth=1.5, markersize=5)
