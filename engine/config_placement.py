"""Where the roles of a run are placed on a cluster, and what each gets there. No torch here.

`headrace launch CONFIG --on slurm|ray` and `headrace manifests` read it; a launch on one machine does not.
"""

from __future__ import annotations

from typing import Literal

from msgspec import field

from engine.config_section import Section

PlacedRole = Literal["buffer", "reward", "learner", "generator"]


class Resources(Section, frozen=True):
    """Of one process. `cpus` are cores, `gpus` whole cards; without `memory_gb` the cluster's default holds."""

    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None


class LearnerPlacement(Resources, frozen=True):
    """Resources of one rank. The ranks are spread evenly over `nodes`; where these are several, they meet at `port` of the
    first one."""

    nodes: int = 1
    port: int = 29400


class GeneratorPlacement(Resources, frozen=True):
    """Resources of one generator. Each node takes an equal number of them, rounded up; what `nodes` holds beyond that are
    spares, to which a generator goes when its node is lost."""

    nodes: int = 1


class SlurmPlacement(Section, frozen=True):
    """What `sbatch` is told: for every part of the job, and by `role_extra` for that of one role alone (`buffer`, which has
    the rewards too, `learner`, `generator`). `requeue`: the job starts anew, and continues the run, when the node of
    the buffer is lost."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    requeue: bool = True
    extra: list[str] = field(default_factory=list)
    role_extra: dict[Literal["buffer", "learner", "generator"], list[str]] = field(default_factory=dict)


class RayPlacement(Section, frozen=True):
    """`address` of a cluster that runs; `resources` are custom ones, of one process of a role."""

    address: str = "auto"
    resources: dict[PlacedRole, dict[str, float]] = field(default_factory=dict)


class KubernetesPlacement(Section, frozen=True):
    """`image` has this package installed. The volume of `storage` bytes (a Kubernetes quantity) is the working directory of
    every pod, so paths of the config are paths in it; it is claimed as `claim`, or made under that name."""

    image: str | None = None
    namespace: str = "default"
    claim: str = "headrace"
    storage: str = "1Ti"
    storage_class: str | None = None
    port: int = 5555
    node_selector: dict[PlacedRole, dict[str, str]] = field(default_factory=dict)


class Placement(Section, frozen=True):
    buffer: Resources = Resources()
    reward: Resources = Resources()
    learner: LearnerPlacement = LearnerPlacement()
    generator: GeneratorPlacement = GeneratorPlacement()
    slurm: SlurmPlacement = SlurmPlacement()
    ray: RayPlacement = RayPlacement()
    kubernetes: KubernetesPlacement = KubernetesPlacement()


def per_node(count: int, nodes: int) -> int:
    """How many of `count` processes one of `nodes` machines takes at most."""
    return -(-count // nodes)
