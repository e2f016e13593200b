"""The curves of value pretraining as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_curve(curve: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Writes a PNG: value loss and explained variance on the held-out groups against the step."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    steps = [row["step"] for row in curve]
    loss, explained = figure.subplots(1, 2)
    loss.plot(steps, [row["value_loss"] for row in curve], "o-", label="held out", markersize=3)
    loss.plot(steps, [row["trained_value_loss"] for row in curve], "-", label="trained", alpha=0.6)
    loss.set_title("value loss, 0.5 (V - R)²")
    loss.legend(fontsize="small")
    explained.plot(steps, [row["explained_variance"] for row in curve], "o-", markersize=3)
    explained.set_title("explained variance, held out")
    for axes in (loss, explained):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
