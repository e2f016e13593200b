"""`tools/experiments/utel_ablation`: what UTel's pretraining tasks, the boxes and the clip distance are worth for entity tagging,
and how it reads rows that are longer than those it was trained on.

    tools/experiments/utel_ablation receipts --receipts data/sroie_receipts.jsonl.gz --seeds 0 1 2
    tools/experiments/utel_ablation synthetic
    tools/experiments/utel_ablation clip --receipts data/sroie_receipts.jsonl.gz
    tools/experiments/utel_ablation length --receipts data/sroie_receipts.jsonl.gz --steps 300 300
    tools/experiments/utel_ablation receipts --report      # the table of what has run so far

Every arm is two runs of the real pipeline, pretraining and tagging. Runs that are done are not run again, one that was cut
off goes on. Seed after seed the table is printed, and all figures and commands are written to TABLE.json in `--runs`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from engine.config import ConfigError, load_config
from tools.benchmarks.__main__ import machine
from tools.experiments.runs import Run, execute_all, exit_code
from tools.experiments.utel_arms import (
    PRETRAINING,
    TABLES,
    TAGGING,
    TESTED,
    TRAINED,
    PageArm,
    PageExperiment,
    PageTable,
)
from tools.experiments.utel_figures import PagesMeasured, held_out_figures, lengths_table, pages_table, summarize_pages

WIDTH = 150
"""Columns of a table that goes to a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and reports; the exit code, see `runs.exit_code`."""
    options = _options(arguments)
    return exit_code("utel_ablation", lambda: [text for name in options.tables for text in _table(name, options)])


def experiment_of(name: str, options: argparse.Namespace) -> PageExperiment:
    """A table's runs. Raises `ConfigError` for settings that do not fit, and for receipts that are not there."""
    table, receipts = TABLES[name], Path(options.receipts).resolve()
    if table.data != "synthetic" and not options.report and not receipts.exists():
        raise ConfigError(f"{receipts}: no such file; expected receipts in SROIE's form, see {TAGGING}")
    pretraining, tagging = options.steps or [load_config(path).steps for path in (PRETRAINING, TAGGING)]
    if unknown := set(options.arms or []) - {arm.name for arm in table.arms}:
        known = ", ".join(arm.name for arm in table.arms)
        raise ConfigError(f"--arms: {name} has no {', '.join(sorted(unknown))}, expected some of {known}")
    wanted = {table.start.name, *(options.arms or (arm.name for arm in table.arms))}
    table = PageTable(table.data, tuple(arm for arm in table.arms if arm.name in wanted), table.start)
    return PageExperiment(table, options.runs / table.data, str(receipts), pretraining, tagging, tuple(options.set))


def report(experiment: PageExperiment, name: str, options: argparse.Namespace) -> None:
    """Prints the table and writes its figures, from the arms that are done."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    arms = experiment.table.arms
    found = [(arm.name, [run for seed in options.seeds if (run := measure(experiment, arm, seed))]) for arm in arms]
    summary = summarize_pages(found)
    steps = f"{experiment.pretraining_steps} pretraining and {experiment.tagging_steps} tagging steps"
    if summary:
        console.print(
            lengths_table(f"{name}: {steps} in rows of {TRAINED}", summary, TRAINED, TESTED)
            if experiment.table.data == "sheets"
            else pages_table(f"{name}: {steps}, held-out F1 in %, mean ± deviation over seeds", summary)
        )
    if missing := [arm for arm, runs in found if not runs]:
        console.print(f"not run yet: {', '.join(missing)}")
    facts = {
        "machine": machine(),
        "pretraining_steps": experiment.pretraining_steps,
        "tagging_steps": experiment.tagging_steps,
        "settings_of_all": list(experiment.extra),
        "arms": dict(found),
        "summary": summary,
    }
    options.runs.mkdir(parents=True, exist_ok=True)
    numbers = options.runs / f"{name}.json"
    numbers.write_text(json.dumps(msgspec.to_builtins(facts), indent=2) + "\n", encoding="utf-8")
    console.print(f"figures: {numbers}")


def measure(experiment: PageExperiment, arm: PageArm, seed: int) -> PagesMeasured | None:
    """An arm's figures when all its runs are done."""
    runs = experiment.runs(arm, seed)
    if not all(run.done for run in runs):
        return None
    found = [held_out_figures(run.config.run_dir) for run in runs]
    return PagesMeasured(
        seed=seed,
        commands=[run.command for run in runs],
        tagging=found[-1][0],
        pretraining=found[0][0] if len(found) > 1 else {},
        seconds=sum(seconds for _, seconds in found),
    )


def _table(name: str, options: argparse.Namespace) -> list[str]:
    """Seed by seed, so that whoever stops early has whole comparisons."""
    experiment = experiment_of(name, options)
    failed: list[str] = []
    for seed in [] if options.report else options.seeds:
        failed += execute_all(_runs(experiment, seed))
        if seed != options.seeds[-1]:
            report(experiment, name, options)
    report(experiment, name, options)
    return failed


def _runs(experiment: PageExperiment, seed: int) -> list[Run]:
    """First those whose fresh model the others start from."""
    start = experiment.table.start
    arms = [start, *(arm for arm in experiment.table.arms if arm != start)]
    return [run for arm in arms for run in experiment.runs(arm, seed)]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/experiments/utel_ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="+", metavar="TABLE", choices=list(TABLES), help=", ".join(TABLES))
    parser.add_argument("--receipts", default="data/sroie_receipts.jsonl.gz", metavar="FILE")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these, and the one where the others start")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, nargs=2, metavar="N", help="of pretraining and of tagging")
    parser.add_argument("--runs", type=Path, default=Path("runs/utel-ablation"), metavar="DIR")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
