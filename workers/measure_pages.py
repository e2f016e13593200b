"""Held-out pages of a UTel run, from the metrics of its steps."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from protocols.log import LogReader

PREFIX = "held_out_"
READ = "read"
"""The kind of the events that tell what the reading of documents met."""
SHOWN = ("f1", "f1_strict", "fields_f1", "mllm_accuracy", "swp_accuracy", "swp_accuracy_no_boxes", "cwe_top1")


class PageFigures(Struct, frozen=True):
    """What the weights after `step` steps make of the held-out pages."""

    step: int
    figures: dict[str, float]


def page_figures(log: LogReader) -> list[PageFigures]:
    """Every evaluation on held-out pages, in the order of its steps."""
    found = ((step.step, _held_out(step.metrics.items())) for step in log.steps())
    return [PageFigures(step, figures) for step, figures in found if figures]


def readings(log: LogReader) -> list[str]:
    """What the reading of documents met when the run was last started: pages that were turned, left out, and why."""
    found: list[str] = []
    for event in log.events():
        if event.kind == "started":
            found = []
        elif event.kind == READ:
            found.append(event.detail)
    return found


def page_line(found: PageFigures) -> str:
    """The figures to look at first."""
    shown = [(name, found.figures[name]) for name in SHOWN if name in found.figures]
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in shown)


def _held_out(metrics: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name.removeprefix(PREFIX): value for name, value in metrics if name.startswith(PREFIX)}
