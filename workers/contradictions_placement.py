"""What cannot be right in `[placement]` for the place that a run is launched on: each text names both sides.

Found before anything is submitted or started; what only the cluster knows (partitions, free nodes) it refuses itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.config import Config, ConfigError, SglangEngine, TorchEngine, VllmEngine, load_config
from engine.config_placement import Resources

_CARDS = {
    TorchEngine: "the torch engine's GPUs",
    VllmEngine: "generator.engine.tensor_parallel x pipeline_parallel",
    SglangEngine: "generator.engine.tensor_parallel",
}


def refuse_placement(config: Config, on: str) -> None:
    """Raises `ConfigError` with every contradiction between the placement and the rest of the config."""
    if found := [*placement_errors(config), *_of_place(config, on)]:
        raise ConfigError("\n".join(f"{config.source}: {text}" for text in found))


def placement_errors(config: Config) -> Iterator[str]:
    """What holds on any cluster."""
    placement = config.placement
    roles: dict[str, Resources] = {"buffer": placement.buffer, "learner": placement.learner}
    if config.generates:
        roles |= {"reward": placement.reward, "generator": placement.generator}
    for role, each in roles.items():
        for key, got, low in (("cpus", each.cpus, 1), ("gpus", each.gpus, 0)):
            if got < low:
                yield f"placement.{role}.{key}: got {got}, expected at least {low}"
        if each.memory_gb is not None and not 0 < each.memory_gb < math.inf:
            yield f"placement.{role}.memory_gb: got {each.memory_gb}, expected a positive number"
    for role, nodes in (("learner", placement.learner.nodes), ("generator", placement.generator.nodes)):
        if nodes < 1:
            yield f"placement.{role}.nodes: got {nodes}, expected at least 1"
            return
    if not 1 <= placement.learner.port <= 65535:
        yield f"placement.learner.port: got {placement.learner.port}, expected 1 to 65535"
    yield from _ranks(config)
    yield from _processors(config)


def _ranks(config: Config) -> Iterator[str]:
    nodes, ranks = config.placement.learner.nodes, config.learner.ranks
    if ranks % nodes:
        yield f"placement.learner.nodes = {nodes} takes equal shares of the ranks, and learner.ranks = {ranks}"
    if config.cold_start:
        first = load_config(config.cold_start).learner.ranks
        if first % min(nodes, first):
            yield f"placement.learner.nodes = {nodes} holds for the cold start too, and {config.cold_start} has learner.ranks = {first}"


def _processors(config: Config) -> Iterator[str]:
    placement, learner, generator = config.placement, config.learner, config.generator
    yield from _device("learner", learner.device, placement.learner)
    if placement.learner.gpus > 1:
        yield f"placement.learner.gpus = {placement.learner.gpus} is of one rank, which uses one"
    if learner.threads > placement.learner.cpus:
        yield f"learner.threads = {learner.threads}, and placement.learner.cpus = {placement.learner.cpus} for a rank"
    if generator is None or not config.generates:
        return
    yield from _device("generator", generator.device, placement.generator)
    if generator.threads > placement.generator.cpus:
        yield f"generator.threads = {generator.threads}, and placement.generator.cpus = {placement.generator.cpus}"
    if placement.generator.gpus not in (0, generator.engine.cards):
        what = _CARDS[type(generator.engine)]
        yield f"placement.generator.gpus = {placement.generator.gpus}, and {what} = {generator.engine.cards}"


def _device(role: str, device: str, each: Resources) -> Iterator[str]:
    if device.startswith("cuda") and not each.gpus:
        yield f'{role}.device = "{device}", and placement.{role}.gpus = 0'
    if device == "cpu" and each.gpus:
        yield f'{role}.device = "cpu", and placement.{role}.gpus = {each.gpus}'


def _of_place(config: Config, on: str) -> Iterator[str]:
    slurm = config.placement.slurm
    if on == "kubernetes" and config.placement.kubernetes.image is None:
        yield "placement.kubernetes.image: got none, expected an image with this package installed"
    if on == "slurm":
        extra = [("extra", slurm.extra), *((f"role_extra.{role}", more) for role, more in slurm.role_extra.items())]
        for key, options in extra:
            for option in options:
                if not option.startswith("--") or "\n" in option:
                    yield f"placement.slurm.{key}: got {option!r}, expected options of sbatch such as --qos=high"
