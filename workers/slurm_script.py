"""The job that a run is on Slurm, as text: a function of its config.

One heterogeneous job of two parts. The first has the generators, and on its first node the launcher, the buffer and the
rewards; the second has the learner. The generators come first because Slurm lets a heterogeneous job go on without a node
only where its first part has more nodes than one (its script runs on the first of them).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from engine.config import Config
from engine.config_placement import Resources, per_node

WARNING_S = 120
"""So long before a job's time is over its launcher gets SIGTERM, and ends the run in order."""


class Part(Struct, frozen=True):
    """A part of the job, by the role that gives it its name: what it asks for on each of its nodes."""

    role: str
    nodes: int
    cpus: int
    gpus: int
    memory_mb: int | None
    extra: list[str]


def parts(config: Config) -> list[Part]:
    """In their order in the job: generators (where there are any), learner. The buffer is with the first."""
    placement, slurm = config.placement, config.placement.slurm
    nodes = learner_nodes(config)
    ranks: list[tuple[int, Resources]] = [(config.learner.ranks // nodes, placement.learner)]
    home: list[tuple[int, Resources]] = [(1, placement.buffer)]
    beside = slurm.role_extra.get("buffer", [])
    learner = slurm.role_extra.get("learner", [])
    if not config.generates or config.generator is None:
        return [_part("learner", nodes, home + ranks, [*slurm.extra, *beside, *learner])]
    generators = (per_node(config.generator.count, placement.generator.nodes), placement.generator)
    home += [(config.reward.count, placement.reward), generators]
    extra = [*slurm.extra, *beside, *slurm.role_extra.get("generator", [])]
    return [
        _part("generator", placement.generator.nodes, home, extra),
        _part("learner", nodes, ranks, [*slurm.extra, *learner]),
    ]


def learner_nodes(config: Config) -> int:
    """Over how many nodes the ranks are spread: those of a cold start on one rank take one."""
    return min(config.placement.learner.nodes, config.learner.ranks)


def memory_mb(what: Sequence[tuple[int, Resources]]) -> int | None:
    """Of so many processes of each kind; None where one is left to the cluster."""
    total = 0.0
    for count, each in what:
        if each.memory_gb is None:
            return None
        total += count * each.memory_gb
    return round(total * 1024)


def _part(role: str, nodes: int, what: Sequence[tuple[int, Resources]], extra: list[str]) -> Part:
    cpus = sum(count * each.cpus for count, each in what)
    gpus = sum(count * each.gpus for count, each in what)
    return Part(role, nodes, cpus, gpus, memory_mb(what), extra)


def job_script(
    config: Config, *, file: Path, overrides: Sequence[str], resume: bool, directory: Path, python: str
) -> str:
    """The text for `sbatch`. `file` is the config as it stays until the job starts, `directory` the one that the config's
    paths are relative to. A job that is started anew, or after one that was lost, continues the run."""
    log = config.run_dir.absolute() / "logs" / "slurm-%j.log"
    slurm = config.placement.slurm
    whole = [
        f"--job-name={config.name}",
        f"--output={log}",
        "--open-mode=append",
        f"--signal=B:TERM@{WARNING_S}",
        "--requeue" if slurm.requeue else "--no-requeue",
    ]
    lines = ["#!/bin/bash", "# Written by `headrace launch --on slurm`."]
    for place, part in enumerate(parts(config)):
        if place:
            lines.append("#SBATCH hetjob")
        lines += [f"#SBATCH {_quoted(option)}" for option in [*(whole if not place else []), *_options(config, part)]]
    launch = [python, "-m", "workers.cli", "launch", str(file), "--on", "allocation", "--no-view"]
    launch += [word for override in overrides for word in ("--set", override)]
    lines += [
        f"cd {shlex.quote(str(directory))} || exit 1",
        f"resume={'--resume' if resume else ''}",
        # This job's own run: whether one may be there was looked at before the first submission.
        f"if [ -e {shlex.quote(str(config.run_dir / 'rollouts.db'))} ]; then resume=--resume; fi",
        f"exec {shlex.join(launch)} $resume",
    ]
    return "\n".join(lines) + "\n"


def _options(config: Config, part: Part) -> list[str]:
    slurm = config.placement.slurm
    named = {"partition": slurm.partition, "account": slurm.account, "time": slurm.time}
    options = ["--no-kill", *(f"--{name}={value}" for name, value in named.items() if value is not None)]
    options += [f"--nodes={part.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={part.cpus}"]
    options += [f"--gpus-per-node={part.gpus}"] * bool(part.gpus)
    options += [f"--mem={part.memory_mb}M"] * (part.memory_mb is not None)
    return options + part.extra


def _quoted(option: str) -> str:
    """As sbatch reads a directive: words end at blanks, but for those within double quotes."""
    name, equals, value = option.partition("=")
    return f'{name}{equals}"{value}"' if " " in value else option
