"""Kills the processes of real runs at random moments, one at a time or all at once, and checks what comes of it.

    bash tools/chaos --kills 50 --seed 1                       # the small config that comes with it
    bash tools/chaos CONFIG --kills 10 --power-cuts 2 --json chaos.json
    bash tools/chaos --resume chaos.json                       # goes on with one that was stopped
    bash tools/chaos --kills 0 --cuts 2 --cut 30               # one more generator, cut off from all others for 30 s

Each fault is done once the run has made progress since the last. Afterwards every run is audited, and trained again from
its log (`headrace replay --verify`). Exit code 1 when anything was violated.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tools.faults.campaign import Campaign
from tools.faults.network import Network
from tools.faults.result import Result, Settings, figures, read, write
from tools.faults.switch import NoNetwork

OWN = Path(__file__).with_name("chaos.toml")


def main(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="What is run.")] = OWN,
    kills: Annotated[int, typer.Option(min=0, help="Faults of one process: SIGKILL, or SIGSTOP for a while.")] = 12,
    power_cuts: Annotated[int, typer.Option(min=0, help="Times that everything is killed at once.")] = 0,
    cuts: Annotated[int, typer.Option(min=0, help="Times that a generator's network is cut (needs root).")] = 0,
    cut: Annotated[float, typer.Option(min=0.1, help="Seconds that it stays cut.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the choice of processes and moments.")] = 0,
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs go; a temporary folder if left out.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Where all figures go, after every fault.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with the campaign that wrote this; only the limit is anew."),
    ] = None,
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
    settings, earlier = Settings(
        config=str(config), overrides=set or [], out=(out or Path(tempfile.mkdtemp(prefix="headrace-chaos-"))).resolve(),
        kills=kills, power_cuts=power_cuts, seed=seed, recover_s=recover, limit_s=limit, pause_s=pause,
        stops_s=[float(text) for text in stops.split(",")], cuts=cuts, cut_s=cut,
    ), None  # fmt: skip
    if resume is not None:
        settings, earlier, json_path = *_earlier(resume, limit), json_path or resume
    result = _campaign(settings, earlier, json_path, Console(highlight=False, soft_wrap=True))
    raise typer.Exit(1 if result.violations or result.unmade else 0)


def _campaign(settings: Settings, earlier: Result | None, json_path: Path | None, console: Console) -> Result:
    """Runs it to its end, says what comes of it, and keeps `json_path` up to date."""
    began = time.monotonic()
    console.print(
        f"chaos: {settings.kills} faults, {settings.cuts} network cuts and {settings.power_cuts} power cuts, seed "
        f"{settings.seed}; runs in {settings.out}"
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run under way is ended too

    def keep() -> None:
        if json_path is not None:
            write(json_path, settings, campaign.result, seconds=time.monotonic() - began)

    def tell() -> None:
        keep()
        if campaign.result.runs[-1].checked:
            _print(campaign.result, console)

    with _network(settings) as network:
        campaign = Campaign(
            settings, lambda text: console.print(text, markup=False), tell=tell, network=network, earlier=earlier
        )
        try:
            result = campaign.run()
        except BaseException:  # stopped by hand: what was found until then counts
            _print(campaign.result, console)
            raise
    keep()
    console.print(
        f"{len(result.outcomes)} faults, {len(result.violations)} violations"
        + (f", {result.unmade} not made for want of time" if result.unmade else "")
    )
    return result


def _earlier(path: Path, limit_s: float) -> tuple[Settings, Result]:
    """What a campaign had found when it was stopped; a config file by a relative path is looked for from here."""
    try:
        settings, result = read(path)
    except (OSError, msgspec.MsgspecError) as error:
        raise typer.BadParameter(f"--resume {path}: got {error}, expected a file that --json wrote") from error
    return msgspec.structs.replace(settings, limit_s=limit_s), result


@contextlib.contextmanager
def _network(settings: Settings) -> Iterator[Network | None]:
    """What is to be cut; this process and the runs move into it. None where nothing is to be."""
    if not settings.cuts:
        yield None
        return
    try:
        network = Network()
    except NoNetwork as error:
        raise typer.BadParameter(f"--cuts {settings.cuts}: {error}") from error
    with network:
        yield network


def _print(result: Result, console: Console) -> None:
    table = Table("what", "faults", "works again after", "next step after", "violations", title="faults and recoveries")
    for name, row in figures(result.outcomes).items():
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


def _times(median: float | int | None, worst: float | int | None) -> str:
    return "-" if median is None or worst is None else f"{median:.1f} s, worst {worst:.1f} s"


if __name__ == "__main__":
    typer.run(main)
