"""What the arms of UTel's ablation measured: entity F1 and field F1 of held-out pages, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct
from rich import box
from rich.table import Table
from rich.text import Text

from engine.learn_pages import length_name
from tools.experiments.figures import Spread, spread
from tools.experiments.picture import number
from workers.measure_pages import PREFIX
from workers.metrics import read_metrics

AGAINST = "none"
"""The arm that gains are against."""
HEADS = ("f1", "f1_strict", "fields_f1")
SHOWN = 8
"""Fields that have a column each; those of more kinds of pages are in the file of figures."""


class PagesMeasured(Struct, frozen=True):
    """One finished arm: the last held-out figures of its runs (pretraining's are empty without one)."""

    seed: int
    commands: list[str]
    tagging: dict[str, float]
    pretraining: dict[str, float]
    seconds: float


class PagesSummary(Struct, frozen=True):
    """An arm over its seeds; `gain` is entity F1 against the arm `AGAINST`, paired by seed."""

    arm: str
    seeds: list[int]
    figures: dict[str, Spread]
    pretraining: dict[str, Spread]
    gain: Spread | None


def held_out_figures(run_dir: Path) -> tuple[dict[str, float], float]:
    """The last held-out figures of a finished run, and the seconds that its steps took. Raises `MetricsError`, and `ValueError`
    when there are none."""
    steps = read_metrics(run_dir).steps
    found = [step for step in steps if any(name.startswith(PREFIX) for name in step)]
    if not found:
        raise ValueError(f"{run_dir}: got {len(steps)} steps without held-out figures, expected an evaluation")
    figures = {name.removeprefix(PREFIX): value for name, value in found[-1].items() if name.startswith(PREFIX)}
    return figures, sum(float(step["train_s"]) for step in steps)


def summarize_pages(arms: Sequence[tuple[str, list[PagesMeasured]]]) -> list[PagesSummary]:
    """One summary an arm that has runs."""
    base = {run.seed: run.tagging["f1"] for name, runs in arms if name == AGAINST for run in runs}
    found = []
    for name, runs in arms:
        pairs = [run.tagging["f1"] - base[run.seed] for run in runs if run.seed in base and name != AGAINST]
        if runs:
            found.append(
                PagesSummary(
                    arm=name,
                    seeds=[run.seed for run in runs],
                    figures=_spreads([run.tagging for run in runs]),
                    pretraining=_spreads([run.pretraining for run in runs]),
                    gain=spread(pairs) if pairs else None,
                )
            )
    return found


def pages_table(title: str, found: Sequence[PagesSummary]) -> Table:
    """One row an arm: F1 in percent of entities (seqeval's default and strict readings), of the fields' values, and of each
    field, where they are few enough to stand in a line; mean over seeds, plus or minus their standard deviation."""
    fields = sorted({name for arm in found for name in arm.figures if name.startswith("fields_f1_")})
    fields = fields if len(fields) <= SHOWN else []
    made = Table(title=title, box=box.SIMPLE, padding=(0, 1))
    made.add_column("arm", no_wrap=True)
    for name in (
        "seeds",
        "entities",
        "gain",
        "strict",
        "fields",
        *(name.removeprefix("fields_f1_") for name in fields),
    ):
        made.add_column(name, no_wrap=True, justify="right")
    for arm in found:
        first, *others = [*HEADS, *fields]
        gain = "" if arm.gain is None else number(arm.gain, scale=100, signed=True)
        made.add_row(
            Text(arm.arm, style="bold"),
            str(len(arm.seeds)),
            _cell(arm, first),
            gain,
            *(_cell(arm, name) for name in others),
        )
    return made


def lengths_table(title: str, found: Sequence[PagesSummary], trained: int, tested: Sequence[int]) -> Table:
    """One row an arm and length of the rows that it reads: accuracy in percent of masked and of surrounding words after
    pretraining, F1 of entities after tagging; mean over seeds, plus or minus their standard deviation."""
    made = Table(title=f"{title}, held-out figures in %", box=box.SIMPLE, padding=(0, 1))
    made.add_column("arm", no_wrap=True)
    for name in ("read in rows of", "seeds", "masked words", "surrounding words", "entities", "strict"):
        made.add_column(name, justify="right")
    for arm in found:
        for length in (trained, *tested):
            figures = [
                number(of[name], scale=100) if (name := length_name(kind, length, trained)) in of else ""
                for of, kinds in ((arm.pretraining, ("mllm_accuracy", "swp_accuracy")), (arm.figures, HEADS[:2]))
                for kind in kinds
            ]
            made.add_row(Text(arm.arm, style="bold"), str(length), str(len(arm.seeds)), *figures)
    return made


def _cell(arm: PagesSummary, name: str) -> str:
    return number(arm.figures[name], scale=100) if name in arm.figures else ""


def _spreads(runs: Sequence[dict[str, float]]) -> dict[str, Spread]:
    """Of the figures that every run has."""
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: spread([run[name] for run in runs]) for name in names}
