"""`tools/experiments/plan_check`: ten recorded runs, and how far `headrace plan` is from each.

Seven runs have generators that are paced by the clock (`tools/benchmarks/paced_generator.py`), every other role being the real
one; three are the quickstart with fresh weights, whose generators compute. They differ in lag, in the number of generators and
in the groups of a step. Each is predicted twice: from the parts' times in its first third, compared over the rest, and from
those of the whole run, compared over the whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.config import load_config
from protocols.log import Log
from tools.benchmarks.overlap import Bench
from workers.plan.check import JUDGED, SHARES, Comparison, compare
from workers.run_folder import complete

TIMEOUT_S = 600.0
"""Of one run, from its launch to its end."""
SLOTS = 24
LIMIT = 0.15
FRESH = (
    "cold_start=", "eval.prompts=0", "buffer.dynamic_sampling=false", "learner.checkpoint_every=100000", "generator.engine.slots=64",
)  # fmt: skip
"""The quickstart without its cold start; the answers of fresh weights are all wrong, and are trained on all the same."""


class Case(Struct, frozen=True):
    """One run. `pace`: tokens a second and slot of each generator; None for generators that compute."""

    name: str
    lag: int
    generators: int
    groups: int
    pace: float | None = None
    steps: int = 24

    def settings(self, folder: Path) -> list[str]:
        own = [
            f'name="{self.name}"', f'runs="{folder}"', f"steps={self.steps}", f"buffer.max_lag={self.lag}",
            f"generator.count={self.generators}", f"buffer.groups_per_step={self.groups}",
        ]  # fmt: skip
        return own if self.pace else [*own, *FRESH]

    def command(self, folder: Path) -> tuple[Path, list[str]]:
        """The config, and what starts the run."""
        sets = [part for setting in self.settings(folder) for part in ("--set", setting)]
        if self.pace:
            config = folder / "overlap.toml"
            paces = ["--paces", json.dumps({"": self.pace})]
            return config, [sys.executable, "-m", "tools.benchmarks.paced_roles", "launch", str(config), *paces, *sets]
        config = Path("configs/quickstart.toml")
        return config, [sys.executable, "-m", "workers.cli", "launch", str(config), "--no-view", *sets]


CASES = [
    Case("paced-lag0", 0, 1, 6, 150, steps=30),
    Case("paced-lag1", 1, 1, 6, 150),
    Case("paced-lag2", 2, 1, 6, 150),
    Case("paced-two-lag1", 1, 2, 8, 100),
    Case("paced-two-lag2", 2, 2, 4, 100),
    Case("paced-three-lag0", 0, 3, 8, 100),
    Case("paced-three-lag2", 2, 3, 8, 100),
    Case("fresh-lag0", 0, 1, 16),
    Case("fresh-lag1", 1, 1, 32),
    Case("fresh-two-lag2", 2, 2, 16),
]


def record(case: Case, folder: Path) -> Path:
    """The run's folder; made now unless it is complete. Raises RuntimeError with the end of what a failed launch said."""
    path, command = case.command(folder)
    config = load_config(path, case.settings(folder))
    if not complete(config):
        console = folder / f"{case.name}.log"
        with console.open("ab") as out:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=TIMEOUT_S, check=False
            )
        if done.returncode != 0:
            raise RuntimeError(
                f"{case.name}: exit code {done.returncode}:\n{console.read_text(encoding='utf-8')[-2000:]}"
            )
    return config.run_dir


def show(found: list[tuple[Case, float, Comparison]], console: Console) -> None:
    """A line for each run and part."""
    table = Table(title="recorded / predicted (error)")
    for column in ("run", "lag, generators, groups", "costs of", *(name.replace("_", " ") for name in JUDGED), "worst"):
        table.add_column(column, justify="right" if column not in ("run", "costs of") else "left")
    for case, _, each in found:
        cells = []
        for name in JUDGED:
            form = ".1%" if name in SHARES else ",.3g" if name != "tokens_per_second" else ",.0f"
            real, predicted = getattr(each.recorded, name), getattr(each.predicted, name)
            cells.append(f"{real:{form}} / {predicted:{form}} ({each.errors[name]:.1%})")
        first, last = each.calibrated
        kind = f"{case.lag}, {case.generators}{'' if case.pace else ' real'}, {case.groups}"
        table.add_row(case.name, kind, f"steps {first}-{last}", *cells, f"{each.worst:.1%}")
    console.print(table)
    for part in sorted({part for _, part, _ in found}):
        own = [each for _, of, each in found if of == part]
        within = sum(each.worst <= LIMIT for each in own)
        which = "the whole run" if part == 1 else f"the first {part:.0%} of the steps"
        console.print(f"costs of {which}: {within} of {len(own)} runs have all judged figures within {LIMIT:.0%}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 once every run is recorded and checked, whatever the errors are."""
    parser = argparse.ArgumentParser(prog="tools/experiments/plan_check", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/plan-check"), help="where the runs lie")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="only these")
    parser.add_argument(
        "--part", nargs="+", type=float, default=[0.33, 1.0], help="of the steps, whose costs are taken"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args(arguments)
    folder: Path = options.runs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "overlap.toml").exists():
        Bench(folder, SLOTS, 1).prepare()
    console = Console(width=190)
    found: list[tuple[Case, float, Comparison]] = []
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        run = record(case, folder)
        for part in options.part:
            with Log.open(run / "rollouts.db") as log:
                found.append((case, part, compare(log, part=part)))
            rows.append({"case": msgspec.to_builtins(case), "part": part, **msgspec.to_builtins(found[-1][2])})
        errors = ", ".join(f"{each.worst:.1%}" for of, _, each in found if of is case)
        console.print(f"{case.name}: largest errors {errors}; load {os.getloadavg()[0]:.1f}")
    show(found, console)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
