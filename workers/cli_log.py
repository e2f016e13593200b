"""Commands on stored runs: train them again, compare two of them, grade one anew."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from engine.config import ConfigError
from workers.tether import die_with_parent

Stored = Annotated[str, typer.Argument(metavar="RUN", help="A run's directory, its name under runs/, or a log.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another setting, e.g. objective.clip_high=0.2.")
]


def replay(
    run: Stored,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the weights after every step with the log.")
    ] = False,
    start: Annotated[
        int, typer.Option("--from", metavar="STEP", help="Start from the run's checkpoint of this step.")
    ] = 0,
    last: Annotated[int | None, typer.Option("--to", metavar="STEP", help="The last step to replay.")] = None,
    set: Settings = None,
    out: Annotated[str | None, typer.Option(metavar="NEW", help="Train into this folder, a run of its own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the replay that is in NEW.")] = False,
) -> None:
    """Train a stored run again: --verify its weights, or --out NEW with other settings."""
    if os.environ.get("HEADRACE_TETHERED") and "RANK" in os.environ:
        die_with_parent(os.getppid(), signal.SIGKILL)
    if verify == (out is not None):
        raise ConfigError("replay: expected either --verify or --out NEW")
    if verify and (set or resume):
        raise ConfigError("replay: --verify trains with the run's own settings; --set and --resume go with --out NEW")
    if out is not None and start:
        raise ConfigError("replay: --from goes with --verify; a run in --out NEW has all its steps")
    from workers.replay import Request, replay

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    request = Request(run=run, start=start, last=last, overrides=set or [], out=out, resume=resume)
    raise typer.Exit(replay(request, sys.argv[1:]))


def compare(
    run: Stored,
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another run.")],
    out: Annotated[
        str | None, typer.Option(metavar="PNG", help="Where the curves go; compare.png in OTHER if left out.")
    ] = None,
) -> None:
    """Compare two runs step by step, from their logs."""
    from rich.console import Console

    from workers.compare import compare

    compare(run, other, out, Console(highlight=False))


def regrade(
    run: Stored,
    out: Annotated[str, typer.Option(metavar="NEW", help="The folder of the new log.")],
    reward: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Score every task with this function.")
    ] = None,
    set: Settings = None,
) -> None:
    """Put every stored response through another reward, into a new log."""
    from rich.console import Console

    from workers.regrade import regrade

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    regrade(run, out, reward=reward, overrides=set or [], console=Console(highlight=False))


COMMANDS = (replay, compare, regrade)
