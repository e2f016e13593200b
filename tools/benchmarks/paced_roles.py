"""A launch whose generators are paced by the clock (`paced_generator.py`); every other role is the real one.

    python -m tools.benchmarks.paced_roles launch CONFIG --paces '{"": 40, "generator-1": 10}' [--set KEY=VALUE ...]

is `headrace launch`, and `headrace scale` works on it. `paces` are tokens a second and slot by generator, "" for those
that are not named.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from tools.benchmarks import paced_generator
from workers import cli
from workers.launch import launch

KEY = "HEADRACE_PACES"
COMMAND = (sys.executable, "-m", "tools.benchmarks.paced_roles")


def start(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    paces: Annotated[str, typer.Option(help="JSON: tokens a second and slot, by generator.")],
    set: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Launch a run whose generators are paced."""
    os.environ[KEY] = paces
    raise typer.Exit(launch(str(config), set or [], live=False, command=COMMAND))


def main() -> None:
    """As `headrace`, but for `launch` and `generator`."""
    role, *rest = sys.argv[1:]
    if role == "launch":
        sys.argv[1:] = rest
        typer.run(start)
    elif role == "generator":
        paces = json.loads(os.environ[KEY])
        name = rest[rest.index("--name") + 1]
        sys.argv[1:] = [*rest, "--pace", str(paces.get(name, paces.get("")))]
        typer.run(paced_generator.main)
    else:
        cli.main()


if __name__ == "__main__":
    main()
