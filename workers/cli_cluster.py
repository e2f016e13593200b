"""Commands for clusters that start a run's processes themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.config import load_config


def manifests(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A run's TOML file.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the YAML files and the keys.")],
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value, e.g. learner.lr=1e-5.")
    ] = None,
) -> None:
    """Write a run as Kubernetes manifests, from its [placement]: kubectl apply -f DIR."""
    from workers.kubernetes import render

    for path in render(load_config(config, set), str(config), set or [], out):
        print(path)


COMMANDS = (manifests,)
