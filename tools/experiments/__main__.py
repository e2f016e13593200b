"""`tools/experiments/vcppo`: the papers' component tables in small, every arm a run of the real pipeline.

    tools/experiments/vcppo ladder --seeds 0 1 2          # DAPO's Table 1
    tools/experiments/vcppo components lambda             # VC-PPO's Tables 2 and 4
    tools/experiments/vcppo --report                      # tables and pictures of what has run so far

Rows, cold start, value pretraining and arms: whatever a table wants is made, once. Runs that are done are not run again, one
that was cut off goes on. Everything lies in the folder `--runs`: for each table TABLE.json with all figures and commands, and
TABLE.png with the curves, written anew after every seed; the runs themselves are in a folder for each task.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from engine.config import JsonlTask, load_config
from tools.benchmarks.__main__ import machine
from tools.experiments import picture
from tools.experiments.arms import SETS, Arm, Comparison, Task, changes
from tools.experiments.figures import Measured, measured, summarize
from tools.experiments.runs import Experiment, execute_all, exit_code

WIDTH = 132
"""Columns of a table that goes to a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and reports; the exit code, see `runs.exit_code`."""
    options = _options(arguments)
    return exit_code("vcppo", lambda: _compare(options))


def _compare(options: argparse.Namespace) -> list[str]:
    """All tables; the runs that failed."""
    experiments = {name: _experiment(SETS[name], options) for name in options.tables}
    failed = [] if options.report else _run(experiments, options)
    for name, experiment in experiments.items():
        report(experiment, name, options)
    return failed


def report(experiment: Experiment, name: str, options: argparse.Namespace) -> None:
    """Prints a table and writes its JSON and PNG, from the runs that are done."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH)
    arms = arms_of(experiment, name)
    runs = [(arm, [measure(experiment, arm, seed) for seed in options.seeds]) for arm in arms]
    done = [(arm, [run for run in found if run is not None]) for arm, found in runs]
    changed = changes(experiment.task.base, arms)
    found = summarize([(arm.name, change, runs) for (arm, runs), change in zip(done, changed, strict=True)])
    title = f"{name}: {experiment.steps} steps, mean ± deviation over seeds, accuracies in %"
    if found:
        console.print(picture.table(title, found))
    for arm, change in zip(arms, changed, strict=True):
        console.print(f"{arm.name}: {change}")
    if missing := [arm.name for arm, runs in done if not runs]:
        console.print(f"not run yet: {', '.join(missing)}")
    options.runs.mkdir(parents=True, exist_ok=True)
    image, numbers = (options.runs / f"{name}.{kind}" for kind in ("png", "json"))
    picture.draw(title, [(arm.name, runs) for arm, runs in done], image)
    document = _document(experiment, done, found)
    numbers.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(f"curves: {image}\nfigures: {numbers}")


def arms_of(experiment: Experiment, name: str) -> list[Arm]:
    """The arms of a table."""
    return SETS[name].arms(load_config(experiment.task.base, list(experiment.extra)), experiment.critic_folder)


def measure(experiment: Experiment, arm: Arm, seed: int) -> Measured | None:
    """A run's figures when it is done."""
    run = experiment.run(arm, seed)
    return measured(run.config.run_dir, seed=seed, command=run.command) if run.done else None


def _experiment(comparison: Comparison, options: argparse.Namespace) -> Experiment:
    task = comparison.task
    steps = options.steps or load_config(task.base, options.set).steps
    return Experiment(task, options.runs / task.name, steps, tuple(options.set))


def _run(experiments: dict[str, Experiment], options: argparse.Namespace) -> list[str]:
    """Seed by seed, so that whoever stops early has whole comparisons. Arms that tables share are run once."""
    arms: dict[str, tuple[Experiment, dict[str, Arm]]] = {}
    for name, experiment in experiments.items():
        shared = arms.setdefault(experiment.task.name, (experiment, {}))[1]
        shared |= {arm.name: arm for arm in arms_of(experiment, name)}
    failed = []
    for experiment, _ in arms.values():
        _write_rows(experiment.task)
        failed += execute_all([*experiment.cold, *experiment.critic])
    for seed in options.seeds if not failed else []:
        failed += execute_all([experiment.run(arm, seed) for experiment, own in arms.values() for arm in own.values()])
        for name, experiment in experiments.items() if seed != options.seeds[-1] else ():
            report(experiment, name, options)
    return failed


def _write_rows(task: Task) -> None:
    """The task's file, where it is not there."""
    for rows in load_config(task.base).tasks:
        if isinstance(rows, JsonlTask) and not Path(rows.path).exists():
            task.write(Path(rows.path))


def _document(experiment: Experiment, done: Sequence[tuple[Arm, list[Measured]]], found: Sequence[Any]) -> Any:
    facts = {
        "machine": machine(),
        "base": experiment.task.base,
        "beforehand": [job.command for job in [*experiment.cold, *experiment.critic]],
        "settings_of_all": list(experiment.extra),
        "steps": experiment.steps,
        "arms": {
            arm.name: {"settings": list(arm.settings), "pretrained_critic": arm.pretrained, "runs": runs}
            for arm, runs in done
        },
        "summary": list(found),
    }
    return msgspec.to_builtins(facts)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/experiments/vcppo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"some of {', '.join(SETS)} (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--steps", type=int, metavar="N", help="of the policy, in every arm")
    parser.add_argument("--runs", type=Path, default=Path("runs/vcppo"), metavar="DIR")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all arms")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.tables) - set(SETS)):
        parser.error(f"TABLE: got {', '.join(unknown)}, expected some of {', '.join(SETS)}")
    options.tables = options.tables or list(SETS)
    return options


if __name__ == "__main__":
    sys.exit(main())
