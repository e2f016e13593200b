"""The command that plans a run before it is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.config import ConfigError

Pairs = list[str] | None


def plan(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="A run's TOML file.")] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="N[xKIND]", help="What to share out: 64xh100, or 8 with --from RUN.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="7b, 32b, ... or a folder; the config's if left out.")] = None,
    run: Annotated[
        str | None, typer.Option("--from", metavar="RUN", help="Take costs and lengths from this run.")
    ] = None,
    learner: Annotated[int | None, typer.Option(min=1, help="GPUs of the learner, instead of a search.")] = None,
    cost: Annotated[Pairs, typer.Option(metavar="KEY=VALUE", help="An assumption on hardware, e.g. mfu=0.45.")] = None,
    lengths: Annotated[
        Pairs, typer.Option(metavar="KEY=VALUE", help="Of responses: median, sigma, longest, keep, prompt.")
    ] = None,
    set: Annotated[Pairs, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the config.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=5, help="Steps to simulate; as many as it takes if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    check: Annotated[str | None, typer.Option(metavar="RUN", help="Predict this recorded run and compare.")] = None,
    part: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="With --check: of the steps, whose costs are taken; 1 for all.")
    ] = 0.33,
    limit: Annotated[float, typer.Option(min=0.0, help="With --check: the largest error for exit code 0.")] = 0.15,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures here.")] = None,
) -> None:
    """Predict a run by simulation with its own scheduler, and how to share GPUs; or --check a recorded run."""
    from rich.console import Console

    if (config is None) == (check is None):
        raise ConfigError("plan: expected a CONFIG, or --check RUN")
    console = Console(highlight=False)
    if check is not None:
        from workers.plan.check import check as check_run

        raise typer.Exit(check_run(check, part=part, limit=limit, seed=seed, json_path=json_path, console=console))
    from workers.plan.command import Request
    from workers.plan.command import plan as plan_run

    request = Request(
        config or "", set or [], gpus, model, run, cost or [], lengths or [], learner, steps, seed, json_path
    )
    raise typer.Exit(plan_run(request, console))


COMMANDS = (plan,)
