"""Which processes a run has, how each is started, and what it sees of the machine."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Sequence

from msgspec import Struct

from engine.config import Config, SftObjective
from workers.supervise import Exit

ROLE_COMMAND = (sys.executable, "-m", "workers.cli")
"""What starts a role: this, the role's name, a config, options. Tests put a program of their own here."""


class Rendezvous(Struct, frozen=True):
    """How a learner's ranks find one another: `nodes` machines that meet at `endpoint` (host:port, on the first) under the name
    `id`. Each is told its place among them by `PET_NODE_RANK` in its environment, as torchrun reads it."""

    nodes: int = 1
    endpoint: str = ""
    id: str = ""


def role_of(name: str) -> str:
    """`generator` of `generator-0`."""
    return name.partition("-")[0]


def roles(config: Config) -> list[str]:
    """The workers' names; rows that come with their solutions need no generator and no reward."""
    if isinstance(config.objective, SftObjective) or config.generator is None:
        return ["learner"]
    generators = [f"generator-{i}" for i in range(config.generator.count)]
    return ["learner", *generators, *(f"reward-{i}" for i in range(config.reward.count))]


def role_command(
    name: str,
    config: Config,
    arguments: Sequence[str],
    *,
    address: str,
    resume: bool,
    command: Sequence[str],
    rendezvous: Rendezvous = Rendezvous(),  # noqa: B008 -- frozen
) -> list[str]:
    """The command of one role. `arguments` are a config file and its overrides; `address` is empty until the buffer
    has published one, later it makes a buffer that is started anew listen where its workers look for it."""
    role = role_of(name)
    prefix, options = list(command), []
    match role:
        case "buffer":
            options = (["--address", address] if address else []) + (["--resume"] if resume else [])
        case "learner":
            options = ["--join", address]
            if config.learner.ranks > 1:
                prefix = [*torchrun(config.learner.ranks, rendezvous), *prefix[1:]]
        case "generator" | "reward":
            options = ["--join", address, "--name", name]
    return [*prefix, role, *arguments, *options]


def role_threads(name: str, config: Config) -> int:
    """Threads of the mathematics in one process of a role."""
    match role_of(name):
        case "learner":
            return config.learner.threads
        case "generator" if config.generator is not None:
            return config.generator.threads
    return 1


def torchrun(ranks: int, where: Rendezvous = Rendezvous()) -> list[str]:  # noqa: B008 -- frozen
    """The command that starts `ranks` processes of what follows: on this machine, or an equal share of them on each of the
    machines that run it."""
    run = [sys.executable, "-m", "torch.distributed.run"]
    if where.nodes == 1:
        return [*run, "--standalone", "--nproc-per-node", str(ranks)]
    # Static: which machine is the first is told (PET_NODE_RANK), and not guessed from what its host name resolves to.
    host, _, port = where.endpoint.rpartition(":")
    meet = ["--rdzv-backend", "static", "--master-addr", host, "--master-port", port, "--rdzv-id", where.id]
    return [*run, "--nnodes", str(where.nodes), *meet, "--nproc-per-node", str(ranks // where.nodes)]


def is_refusal(exit: Exit) -> bool:
    """Exit code 2 says that starting anew cannot help, and so do last words; torchrun hides a rank's code behind its own,
    in a table."""
    return (
        exit.code == 2
        or exit.refusal != ""
        or (exit.code == 1 and re.search(r"exitcode\s*:\s*2\b", exit.tail) is not None)
    )


def place(config: Config, gpus: list[str]) -> dict[str, dict[str, str]]:
    """Which GPUs each role sees: the learner's ranks the first ones, generators those after, as many as each uses, around
    again when they run out. Nothing for a device that the config names itself."""
    if len(gpus) < 2:
        return {}
    ranks = config.learner.ranks
    seen = {}
    if config.learner.device == "auto" and ranks <= len(gpus):
        seen["learner"] = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[:ranks])}
    if config.generator is not None and config.generator.device == "auto":
        each = min(config.generator.engine.cards, len(gpus))
        for i in range(config.generator.count):
            own = [gpus[(ranks + i * each + k) % len(gpus)] for k in range(each)]
            seen[f"generator-{i}"] = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
    return seen


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        return [gpu for gpu in limited.split(",") if gpu.strip()]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
