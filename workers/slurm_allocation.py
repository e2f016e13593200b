"""Inside a Slurm job: each learner and generator is a step of it, started by `srun` from the node of the launcher.

A job with `--no-kill` whose first part has several nodes goes on when one of them is lost: its steps end, and the launcher
starts their generators anew on what is left.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from engine.config import Config, ConfigError
from engine.config_placement import Resources, per_node
from workers.roles import Rendezvous, role_of
from workers.site import Keeper, in_same_folder, is_elsewhere, reachable_bind, write_token
from workers.slurm_script import learner_nodes, memory_mb, parts
from workers.supervise import Exit, Supervisor

COMMAND_S = 60.0
"""How long one of Slurm's commands may take."""
PLACE_S = 60
"""How long `srun` may wait for the resources of a step; then the launcher counts an attempt."""
FOR_THE_SCRIPT = (
    "SLURM_CPUS_PER_TASK", "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_TRES_PER_TASK",
)  # fmt: skip
"""What a job's script is told of its first part; `srun` would take it for what a step asks for."""
NODE_FAILURE = "srun: error: Node failure"


def slurm(*command: str, timeout_s: float = COMMAND_S) -> str:
    """What a command of Slurm's prints. Raises `ConfigError` with what it says when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]}: not found; is this a machine of a Slurm cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{command[0]}: no answer from Slurm within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        ours = [line.removeprefix("headrace: ") for line in said if line.startswith("headrace: ")]
        raise ConfigError("\n".join(ours or [f"{command[0]} (exit code {done.returncode}):", *said]))
    return done.stdout


class SlurmAllocation:
    """The site of a launch within a job of the parts that `slurm_script.parts` gives for `config`."""

    option: tuple[str, ...] = ("--on", "slurm")
    shares_gpus = False

    def __init__(self, config: Config) -> None:
        """Raises `ConfigError` outside of a job, and in one with too few parts or nodes."""
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("--on allocation: this is no Slurm job (no SLURM_JOB_ID); submit one with --on slurm")
        self.job = os.environ["SLURM_JOB_ID"]
        self.placement = config.placement
        self._parts = parts(config)
        self._nodes = [_nodes(part, len(self._parts)) for part in range(len(self._parts))]
        for place, (part, nodes) in enumerate(zip(self._parts, self._nodes, strict=True)):
            if len(nodes) < part.nodes:
                raise ConfigError(
                    f"placement.{part.role}.nodes: got {part.nodes}, but part {place} of Slurm job {self.job} has "
                    f"{len(nodes)}: {' '.join(nodes) or 'none'}"
                )
        for name in FOR_THE_SCRIPT:
            os.environ.pop(name, None)

    def keeper(self, config: Config, logs: Path) -> Keeper:
        return SlurmSteps(logs, self, config)

    def prepare(self, config: Config) -> None:
        write_token(config.run_dir)
        for part, nodes in zip(self._parts, self._nodes, strict=True):
            step = self.srun(f"look-{part.role}", part.role, len(nodes), Resources())
            slurm(*step, *in_same_folder(config.run_dir, ["true"]), timeout_s=2 * COMMAND_S)

    def bind(self, config: Config) -> str:
        nodes = {node for part in self._nodes for node in part} - {self._nodes[0][0]}
        return reachable_bind(config, map(_address, sorted(nodes)))

    def rendezvous(self, config: Config) -> Rendezvous:
        nodes = learner_nodes(self.placed(config))
        first = self._nodes[-1][0]
        return Rendezvous(nodes, f"{_address(first)}:{self.placement.learner.port}", f"{config.name}-{self.job}")

    def placed(self, config: Config) -> Config:
        """A cold start is placed as the run that it is for."""
        return msgspec.structs.replace(config, placement=self.placement)

    def home_of(self, generator: int, count: int) -> str:
        """The node on which a generator starts first, so that they are spread evenly."""
        nodes = self._nodes[0][: self.placement.generator.nodes]
        return nodes[generator // per_node(count, len(nodes)) % len(nodes)]

    def srun(self, name: str, role: str, nodes: int, each: Resources, node: str | None = None) -> list[str]:
        """What starts one process on each of `nodes` nodes of a role's part, each with these resources."""
        part = [part.role for part in self._parts].index(role)
        command = ["srun", f"--job-name={name}", "--export=ALL", "--exact", "--unbuffered", "--kill-on-bad-exit=1"]
        command += [f"--het-group={part}"] * (len(self._parts) > 1) + [f"--nodelist={node}"] * (node is not None)
        command += [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={each.cpus}"]
        command += [f"--gpus-per-node={each.gpus}"] * bool(each.gpus) + [f"--immediate={PLACE_S}"]
        memory = memory_mb([(1, each)])
        return command + [f"--mem={memory}M"] * (memory is not None)


class SlurmSteps(Supervisor):
    """The children of a launcher in a job: `srun` is the child, what it runs is on another node."""

    def __init__(self, logs: Path, allocation: SlurmAllocation, config: Config) -> None:
        super().__init__(logs)
        self._allocation, self._config = allocation, config
        self._started: set[str] = set()

    def start(self, name: str, command: list[str], env: Mapping[str, str]) -> str:
        if not is_elsewhere(name):
            return super().start(name, command, env)
        found = in_same_folder(self._config.run_dir, command)
        started = super().start(name, [*self._srun(name), *found], env)
        self._started.add(name)
        return f"a step of job {self._allocation.job}, {started}"

    def _srun(self, name: str) -> list[str]:
        config = self._allocation.placed(self._config)
        if role_of(name) == "learner":
            nodes, each = learner_nodes(config), config.placement.learner
            ranks = config.learner.ranks // nodes
            share = Resources(ranks * each.cpus, ranks * each.gpus, each.memory_gb and ranks * each.memory_gb)
            return self._allocation.srun(name, "learner", nodes, share)
        count = config.generator.count if config.generator is not None else 1
        fresh = name not in self._started
        node = self._allocation.home_of(int(name.rpartition("-")[2]), count) if fresh else None
        return self._allocation.srun(name, "generator", 1, config.placement.generator, node)

    def exits(self) -> list[Exit]:
        """`srun` ends with 0 when the node of its step is lost."""
        return [
            msgspec.structs.replace(exit, code=1) if exit.code == 0 and NODE_FAILURE in exit.tail else exit
            for exit in super().exits()
        ]

    def ask_to_end(self, name: str) -> None:
        """Through Slurm: `srun` itself would end its step at once."""
        if not (is_elsewhere(name) and self._signal(name, "--signal=TERM")):
            super().ask_to_end(name)

    def stop(self, names: Iterable[str], *, grace_s: float, hurried: Callable[[], bool] = lambda: False) -> list[str]:
        killed = super().stop(names, grace_s=grace_s, hurried=hurried)
        for name in filter(is_elsewhere, killed):
            self._signal(name, "--signal=KILL")
        return killed

    def _signal(self, name: str, option: str) -> bool:
        """Whether there is a step of this name, and Slurm took the signal for it."""
        try:
            listed = slurm("squeue", "--steps", "--noheader", "--format=%i %j", f"--jobs={_jobs()}")
            steps = [
                step for step, _, called in (line.partition(" ") for line in listed.splitlines()) if called == name
            ]
            if steps:
                slurm("scancel", option, *steps)
        except ConfigError:
            return False
        return bool(steps)


def _jobs() -> str:
    """The ids of the job's parts."""
    ids = [value for key, value in os.environ.items() if key.startswith("SLURM_JOB_ID_HET_GROUP_")]
    return ",".join(ids or [os.environ["SLURM_JOB_ID"]])


def _nodes(part: int, of: int) -> list[str]:
    key = f"SLURM_JOB_NODELIST_HET_GROUP_{part}" if of > 1 else "SLURM_JOB_NODELIST"
    listed = os.environ.get(key, "")
    return slurm("scontrol", "show", "hostnames", listed).split() if listed else []


def _address(node: str) -> str:
    """Where Slurm itself reaches a node; the node's name where it keeps no other."""
    for word in slurm("scontrol", "show", "node", node, "--oneliner").split():
        if word.startswith("NodeAddr="):
            return word.partition("=")[2]
    return node
