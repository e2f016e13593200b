"""Kills the processes of real runs at random moments, one at a time or all at once, and checks what comes of it.

    bash tools/chaos --kills 50 --seed 1                       # the small config that comes with it
    bash tools/chaos CONFIG --kills 10 --power-cuts 2 --json chaos.json

Each fault is done once the run has made progress since the last. Afterwards every run is audited, and trained again from
its log (`headrace replay --verify`). Exit code 1 when anything was violated.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tools.faults.campaign import Campaign, Result, Settings
from tools.faults.drill import Outcome
from workers.provenance import code_version

OWN = Path(__file__).with_name("chaos.toml")


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What is run.")] = OWN,
    kills: Annotated[int, typer.Option(min=0, help="Faults of one process: SIGKILL, or SIGSTOP for a while.")] = 12,
    power_cuts: Annotated[int, typer.Option(min=0, help="Times that everything is killed at once.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of processes and moments.")] = 0,
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs go; a temporary folder if left out.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Where all figures go.")] = None,
    recover: Annotated[float, typer.Option(help="Seconds within which a run must be as before.")] = 180.0,
    limit: Annotated[
        float, typer.Option(help="Seconds after which no further fault is made, and a run is ended.")
    ] = 3600.0,
    pause: Annotated[
        float, typer.Option(help="Longest random wait between progress and the next fault, seconds.")
    ] = 3.0,
    stops: Annotated[str, typer.Option(help="Seconds that a stopped process stays so, one of these.")] = "6,13",
) -> None:
    """Kill processes of a real run at random moments; check that it recovers by itself and that its log keeps its word."""
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    folder = out or Path(tempfile.mkdtemp(prefix="headrace-chaos-"))
    settings = Settings(
        config=str(config), overrides=set or [], out=folder.resolve(), kills=kills, power_cuts=power_cuts, seed=seed,
        recover_s=recover, limit_s=limit, pause_s=pause, stops_s=[float(text) for text in stops.split(",")],
    )  # fmt: skip
    console.print(f"chaos: {kills} faults and {power_cuts} power cuts, seed {seed}; runs in {settings.out}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way is ended too
    result = Campaign(settings, lambda text: console.print(text, markup=False)).run()
    _print(result, console)
    if json_path is not None:
        facts = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "code": code_version(), "seconds": time.monotonic() - began,
            "cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg(), "python": platform.python_version(),
        }  # fmt: skip
        document = {"machine": facts, "settings": settings, "roles": _figures(result.outcomes), "result": result}
        data = {**msgspec.to_builtins(document, enc_hook=str), "violations": result.violations}
        json_path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    raise typer.Exit(1 if result.violations or result.unmade else 0)


def _figures(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float | int | None]]:
    """By role and kind of fault: how many, and the seconds until it worked again and until the next step."""
    found = {}
    for key in sorted({(o.fault.role, o.fault.kind) for o in outcomes}):
        these = [o for o in outcomes if (o.fault.role, o.fault.kind) == key]
        back, step = ([s for o in these if (s := getattr(o, name)) is not None] for name in ("back_s", "step_s"))
        found[f"{key[0]}, {key[1]}"] = {
            "faults": len(these),
            "back_median_s": statistics.median(back) if back else None,
            "back_worst_s": max(back, default=None),
            "step_median_s": statistics.median(step) if step else None,
            "step_worst_s": max(step, default=None),
            "violations": sum(len(o.violations) for o in these),
        }
    return found


def _print(result: Result, console: Console) -> None:
    table = Table("what", "faults", "works again after", "next step after", "violations", title="faults and recoveries")
    for name, row in _figures(result.outcomes).items():
        times = [_times(row["back_median_s"], row["back_worst_s"]), _times(row["step_median_s"], row["step_worst_s"])]
        table.add_row(name, str(row["faults"]), *times, str(row["violations"]))
    console.print(table)
    for run in result.runs:
        console.print(
            f"{run.name}: {run.steps} steps in {run.seconds:.0f} s; {len(run.violations)} violations", markup=False
        )
        for name, counted in run.checks.items():
            console.print(f"    {name:<13} {counted}", markup=False)
        console.print(f"    {'replay':<13} {run.verified}", markup=False)
    for text in result.violations:
        console.print(f"VIOLATION {text}", markup=False)
    made = len(result.outcomes)
    console.print(
        f"{made} faults, {len(result.violations)} violations"
        + (f", {result.unmade} not made for want of time" if result.unmade else "")
    )


def _times(median: float | int | None, worst: float | int | None) -> str:
    return "-" if median is None or worst is None else f"{median:.1f} s, worst {worst:.1f} s"


if __name__ == "__main__":
    typer.run(main)
