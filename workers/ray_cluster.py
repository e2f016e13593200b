"""A launch on a Ray cluster that runs already: what room each role needs there, and its processes as actors
(`workers.ray_actor`). These two files alone know Ray (extra `ray`).

Who is started anew, and how often, is the launcher's to decide as everywhere, so actors are not restarted by Ray: a role
whose node is lost gets a new actor on another one. The launcher runs on a node of the cluster, and the buffer beside it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from engine.config import Config, ConfigError
from engine.config_placement import Resources
from workers.launch_errors import LaunchError
from workers.ray_actor import ACTOR, LOOK_S, Child, look
from workers.roles import Rendezvous, role_of
from workers.site import Keeper, in_same_folder, reachable_bind, write_token
from workers.slurm_script import learner_nodes
from workers.supervise import Exit, tail_of

PLACE_S = 120.0
"""How long Ray may take to find room for a process, and to start its actor."""
ANSWER_S = 30.0
"""How long an actor may be silent: it answers many times a second."""


class RayCluster:
    """The site of a launch on Ray."""

    option: tuple[str, ...] = ("--on", "ray")
    shares_gpus = False

    def __init__(self, config: Config) -> None:
        """Raises `ConfigError` where no cluster answers, or it is too small."""
        self.placement = config.placement
        self.group: Any = None
        address = config.placement.ray.address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f'placement.ray.address = "{address}": no Ray cluster there that this machine is a node of ({error}); '
                "with token authentication it needs the cluster's RAY_AUTH_MODE and RAY_AUTH_TOKEN"
            ) from error
        self.home = ray.get_runtime_context().get_node_id()
        self._refuse_small(config)

    def _refuse_small(self, config: Config) -> None:
        counts = {"buffer": 1, "learner": config.learner.ranks}
        if config.generates and config.generator is not None:
            counts |= {"reward": config.reward.count, "generator": config.generator.count}
        wanted: dict[str, float] = {}
        for role, count in counts.items():
            for name, amount in self.demand(role).items():
                wanted[name] = wanted.get(name, 0.0) + count * amount
        has = ray.cluster_resources()
        for name, amount in wanted.items():
            if amount > has.get(name, 0.0):
                raise ConfigError(
                    f"placement: all roles together need {amount:g} {name}, the Ray cluster has {has.get(name, 0.0):g}"
                )
        nodes = sum(node["Alive"] for node in ray.nodes())
        if learner_nodes(config) > nodes:
            raise ConfigError(f"placement.learner.nodes = {learner_nodes(config)}, the Ray cluster has {nodes}")

    def demand(self, role: str) -> dict[str, float]:
        """Of one process, by Ray's names of resources."""
        each: Resources = getattr(self.placement, role)
        named = {"CPU": float(each.cpus), "GPU": float(each.gpus)}
        memory = {"memory": each.memory_gb * 2**30} if each.memory_gb is not None else {}
        custom = {
            name: amount
            for key, more in self.placement.ray.resources.items()
            if key == role
            for name, amount in more.items()
        }
        return {name: amount for name, amount in (named | memory | custom).items() if amount}

    def keeper(self, config: Config, logs: Path) -> Keeper:
        return RayRoles(self, config, logs)

    def prepare(self, config: Config) -> None:
        write_token(config.run_dir)
        command = in_same_folder(config.run_dir, ["true"])
        task = ray.remote(look)
        asked = [
            task.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(command)
            for node in ray.nodes()
            if node["Alive"]
        ]
        try:
            found = [text for text in ray.get(asked, timeout=2 * LOOK_S) if text]
        except ray.exceptions.RayError as error:
            raise ConfigError(f"the Ray cluster's nodes could not be asked for the run's folder: {error}") from error
        if found:
            raise ConfigError("\n".join(found))

    def bind(self, config: Config) -> str:
        return reachable_bind(
            config, [n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != self.home]
        )

    def rendezvous(self, config: Config) -> Rendezvous:
        """Raises `LaunchError` where the nodes that a learner's ranks need are not free."""
        nodes = learner_nodes(self.placed(config))
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None
        if nodes == 1:
            return Rendezvous()
        ranks = config.learner.ranks // nodes
        bundle = {name: amount * ranks for name, amount in self.demand("learner").items()}
        self.group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
        if not self.group.wait(PLACE_S):
            raise LaunchError(f"Ray found no {nodes} nodes with {bundle} each for the learner within {PLACE_S:.0f} s")
        first = placement_group_table(self.group)["bundles_to_node_id"][0]
        address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == first)
        return Rendezvous(nodes, f"{address}:{self.placement.learner.port}", config.name)

    def placed(self, config: Config) -> Config:
        """A cold start is placed as the run that it is for."""
        return msgspec.structs.replace(config, placement=self.placement)


class RayRoles:
    """The launcher's children where they are actors. Nothing here waits for one of them but `stop`."""

    def __init__(self, cluster: RayCluster, config: Config, logs: Path) -> None:
        self._cluster, self._config, self._logs = cluster, config, logs
        self._children: dict[str, Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    @property
    def running(self) -> list[str]:
        return list(self._children)

    def start(self, name: str, command: list[str], env: Mapping[str, str]) -> str:
        """Raises ValueError for a name that is running."""
        if name in self._children:
            raise ValueError(f"{name} is running already")
        actors = [ACTOR.options(**options).remote() for options in self._options(name)]
        child = Child(actors, self._logs / f"{name}.log")
        for rank, actor in enumerate(actors):
            told = {**env, "PYTHONUNBUFFERED": "1"} | ({"PET_NODE_RANK": str(rank)} if len(actors) > 1 else {})
            child.owed[rank] = actor.start.remote(in_same_folder(self._config.run_dir, command), told)
        self._children[name] = child
        return f"{len(actors)} actor" + "s" * (len(actors) > 1)

    def _options(self, name: str) -> list[dict[str, Any]]:
        role = role_of(name)
        config = self._cluster.placed(self._config)
        demand = self._cluster.demand(role) if role in ("buffer", "reward", "learner", "generator") else {"CPU": 0.0}
        nodes = learner_nodes(config) if role == "learner" else 1
        times = config.learner.ranks // nodes if role == "learner" else 1
        amounts = {key: amount * times for key, amount in demand.items()}
        options: dict[str, Any] = {"num_cpus": amounts.pop("CPU", 0.0), "num_gpus": amounts.pop("GPU", 0.0)}
        if "memory" in amounts:
            options["memory"] = amounts.pop("memory")
        options["resources"] = amounts
        if role in ("buffer", "model"):
            return [{**options, "scheduling_strategy": NodeAffinitySchedulingStrategy(self._cluster.home, soft=False)}]
        if nodes == 1:
            return [{**options, "scheduling_strategy": "SPREAD" if role == "generator" else "DEFAULT"}]
        group = self._cluster.group
        return [
            {
                **options,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place),
            }
            for place in range(nodes)
        ]

    def exits(self) -> list[Exit]:
        """Takes what the actors have sent; the roles that ended since the last call."""
        found = []
        for name, child in list(self._children.items()):
            code = self._hear(name, child)
            if code is not None:
                self._drop(name)
                lived_s = time.monotonic() - child.began
                found.append(Exit(name, code, lived_s, tail_of(child.log, child.offset)))
        return found

    def _hear(self, name: str, child: Child) -> int | None:
        """The exit code of a role of which one process has ended in another way than with 0, or all have."""
        for place, owed in enumerate(child.owed):
            if owed is None or not ray.wait([owed], timeout=0)[0]:
                continue
            child.heard = time.monotonic()
            try:
                answer = ray.get(owed)
            except ray.exceptions.RayError as error:
                child.write(f"headrace: the Ray actor of {name} is lost: {str(error).splitlines()[0]}\n".encode())
                return 1
            child.owed[place] = None
            if child.runs[place]:
                output, child.codes[place] = answer
                child.write(output)
            child.runs[place] = True
            if child.codes[place] is None:
                child.owed[place] = child.actors[place].poll.remote()
            elif child.codes[place] != 0:
                return child.codes[place]
        limit_s = ANSWER_S if all(child.runs) else PLACE_S
        if time.monotonic() - child.heard > limit_s and any(owed is not None for owed in child.owed):
            child.write(
                f"headrace: waited {limit_s:.0f} s for Ray to {'answer for' if all(child.runs) else 'place'} {name}\n".encode()
            )
            return 1
        return 0 if all(code == 0 for code in child.codes) else None

    def _drop(self, name: str) -> None:
        """Ends what is left of a role, its processes by their tether."""
        for actor in self._children.pop(name).actors:
            ray.kill(actor)

    def ask_to_end(self, name: str) -> None:
        for actor in self._children[name].actors:
            actor.kill.remote(int(signal.SIGTERM))

    def stop(self, names: Iterable[str], *, grace_s: float, hurried: Callable[[], bool] = lambda: False) -> list[str]:
        stopping = [name for name in names if name in self._children]
        for name in stopping:
            self.ask_to_end(name)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and not hurried():
            for name in stopping:
                child = self._children.get(name)
                if child is not None and self._hear(name, child) is not None:
                    self._drop(name)
            if not any(name in self._children for name in stopping):
                break
            time.sleep(0.05)
        killed = [name for name in stopping if name in self._children]
        for name in killed:
            ended = [actor.kill.remote(int(signal.SIGKILL)) for actor in self._children[name].actors]
            ray.wait(ended, num_returns=len(ended), timeout=5.0)
            self._drop(name)
        return killed
