"""Commands on critics: pretrain one on a stored run, look at what critics say along its responses."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from workers.tether import die_with_parent

Stored = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name under runs/, or a log.")]


def pretrain_critic(
    run: Stored,
    config: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="Take the sections critic and learner from here, not from the run."),
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting, e.g. critic.lr=1e-3.")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the critic goes; RUN/critic if left out.")
    ] = None,
    every: Annotated[int, typer.Option(metavar="STEPS", help="Measure it so often on groups that are held out.")] = 5,
) -> None:
    """Train only a critic, on the responses of a fixed policy in a log, until it has levelled off."""
    if os.environ.get("HEADRACE_TETHERED") and "RANK" in os.environ:
        die_with_parent(os.getppid(), signal.SIGKILL)
    from workers.pretrain import Request, pretrain

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    request = Request(run=run, config=config, overrides=set or [], out=out, every=every)
    raise typer.Exit(pretrain(request, sys.argv[1:]))


def drift(
    run: Stored,
    critic: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="A critic's folder, several times for several; those in the run if left out."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="PNG", help="Where the picture goes; RUN/drift.png if left out.")
    ] = None,
) -> None:
    """Draw the mean value and the mean advantage of each token position, a line a critic."""
    from rich.console import Console

    from workers.drift import drift

    drift(run, critic or [], out, Console(highlight=False))


COMMANDS = (pretrain_critic, drift)
