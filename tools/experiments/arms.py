"""What is compared: each arm is the base config with some settings changed, as data.

All arms share steps, batch, learning rate and the starting policy; an arm's settings are all that differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct

from engine.config import Config, dump_config, load_config
from tools.experiments import guessed_total, running_total

CACHE = 32
"""Tokens below max_tokens in which the soft overlong punishment grows from 0 to -1."""


class Arm(Struct, frozen=True):
    """`settings` are `--set` texts over the base config. With `pretrained` the critic is not a fresh one."""

    name: str
    settings: tuple[str, ...] = ()
    needs_critic: bool = False
    pretrained: bool = False


class Task(Struct, frozen=True):
    """What a table's arms are trained on. `starts` are the configs of the cold start, each going on from the one before;
    `collect` that of the log on which the critic is pretrained; `write` makes the file of rows."""

    name: str
    base: str
    starts: tuple[str, ...]
    write: Callable[[Path], None]
    collect: str | None = None


class Comparison(Struct, frozen=True):
    """A table: its task, and its arms as a function of the base config and of the pretrained critic's folder."""

    task: Task
    arms: Callable[[Config, Path], list[Arm]]


RUNNING = Task(
    "running-total",
    "configs/running-total.toml",
    ("configs/running-total-sft.toml",),
    lambda path: running_total.main(path),
)
GUESSED = Task(
    "guessed-total",
    "configs/guessed-total.toml",
    ("configs/guessed-total-sft.toml", "configs/guessed-total-settle.toml"),
    lambda path: guessed_total.main(path),
    "configs/guessed-total-collect.toml",
)


def ladder(base: Config, _: Path) -> list[Arm]:
    """DAPO's Table 1 (arXiv 2503.14476), cumulative and in the paper's order; `base` is naive GRPO."""
    longest = math.inf if base.generator is None else base.generator.sampling.max_tokens
    rungs = [
        ("overlong-filter", "objective.overlong_filter=true"),
        ("clip-higher", "objective.clip_high=0.28"),
        ("soft-overlong", f"reward.overlong={{max_length = {longest}, cache = {CACHE}}}"),
        ("token-loss", 'objective.loss="token"'),
        ("dynamic-sampling", "buffer.dynamic_sampling=true"),
    ]
    arms = [Arm("grpo")]
    for name, setting in rungs:
        arms.append(Arm(f"plus-{name}", (*arms[-1].settings, setting)))
    return arms


def components(base: Config, critic: Path) -> list[Arm]:
    """VC-PPO's Table 2 (arXiv 2503.01491): GRPO beside PPO, value pretraining, and both with decoupled GAE."""
    return [
        Arm("grpo"),
        _ppo(base, "ppo", lam_actor=0.95, lam_critic=0.95),
        _ppo(base, "ppo-pretrained", lam_actor=0.95, lam_critic=0.95, critic=critic),
        _ppo(base, "vcppo", lam_actor=0.95, lam_critic=1.0, critic=critic),
    ]


def lambdas(base: Config, critic: Path) -> list[Arm]:
    """VC-PPO's Table 4: the actor's lambda, all else as in VC-PPO."""
    arms = [_ppo(base, f"vcppo-{lam:g}", lam_actor=lam, lam_critic=1.0, critic=critic) for lam in (0.9, 0.99, 1.0)]
    return [arms[0], components(base, critic)[-1], *arms[1:]]


SETS = {
    "ladder": Comparison(RUNNING, ladder),
    "components": Comparison(GUESSED, components),
    "lambda": Comparison(GUESSED, lambdas),
}
"""The tables, by the name that the command line uses."""


def _ppo(base: Config, name: str, *, lam_actor: float, lam_critic: float, critic: Path | None = None) -> Arm:
    """PPO with the base's symmetric clip and sequence-level loss; without `critic` a fresh one starts from the policy with a
    head of zeros."""
    objective = (
        f'objective={{type = "ppo", clip_low = 0.2, clip_high = 0.2, loss = "sequence", '
        f"lam_actor = {lam_actor}, lam_critic = {lam_critic}}}"
    )
    path = "" if critic is None else f', path = "{critic}"'
    settings = f"critic={{lr = {2 * base.learner.lr}, weight_decay = {base.learner.weight_decay}{path}}}"
    return Arm(name, (objective, settings), needs_critic=True, pretrained=critic is not None)


def differences(path: str, arm: Arm, other: Arm) -> dict[str, tuple[Any, Any]]:
    """The values of two arms' configs where they differ, by the key's path; None where a config does not have the key."""
    left, right = (_flat(dump_config(load_config(path, list(one.settings)))) for one in (other, arm))
    keys = [*left, *(key for key in right if key not in left)]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def changes(path: str, arms: list[Arm]) -> list[str]:
    """For each arm in words what it changes against the arm before it; for the first against the base config."""
    texts = []
    for before, arm in pairwise([Arm("base"), *arms]):
        changed = differences(path, arm, before)
        texts.append(
            ", ".join(f"{key} = {new}" for key, (_, new) in changed.items() if new is not None) or "the base config"
        )
    return texts


def _flat(data: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {path: data}
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found
