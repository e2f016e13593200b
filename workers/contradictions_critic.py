"""What cannot be right in a config that trains a critic, or lacks one. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from engine.config import CollectObjective, Config, ConfigError, CriticConfig, LengthAdaptive, PpoObjective
from workers.model_shape import model_shape


def critic(config: Config) -> Iterator[str]:
    """Contradictions between [critic], the objective and the rest of a config."""
    objective, tag = config.objective, config.objective.__struct_config__.tag
    if isinstance(objective, PpoObjective):
        yield from _ppo(objective)
        if config.critic is None:
            yield f'objective.type = "{tag}" trains a critic, and there is no [critic]'
    elif config.critic is not None and not isinstance(objective, CollectObjective):
        yield f'[critic] is there, but objective.type = "{tag}" has no critic; expected ppo, vcppo or vapo'
    if config.critic is not None:
        yield from _critic(config, config.critic)


def missing_critic(config: Config) -> str | None:
    """Why `critic.path` cannot be had on this machine, or cannot belong to the policy; None where nothing is wrong."""
    if config.critic is None or config.critic.path is None:
        return None
    folder = Path(config.critic.path)
    if not (folder / "config.json").is_file():
        return f"critic.path: {folder}: no config.json there; `headrace pretrain-critic` makes such a folder"
    try:
        shape = model_shape(config)
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ConfigError, ZeroDivisionError, OSError, ValueError):
        return None  # said elsewhere: the model is missing, or when the critic is loaded
    for name, expected in (
        ("model_type", shape.family),
        ("vocab_size", shape.vocabulary),
        ("hidden_size", shape.hidden),
        ("num_hidden_layers", shape.layers),
    ):
        if data.get(name) != expected:
            return f"critic.path: {folder} has {name} = {data.get(name)}, the policy has {expected}; expected the same"
    return None


def _ppo(objective: PpoObjective) -> Iterator[str]:
    if not 0 < objective.gamma <= 1:
        yield f"objective.gamma: got {objective.gamma}, expected a number in (0, 1]"
    if not 0 <= objective.lam_critic <= 1:
        yield f"objective.lam_critic: got {objective.lam_critic}, expected a number in [0, 1]"
    if isinstance(objective.lam_actor, LengthAdaptive):
        if not 0 < objective.lam_actor.alpha < math.inf:
            yield f"objective.lam_actor.alpha: got {objective.lam_actor.alpha}, expected a positive number"
    elif not 0 <= objective.lam_actor <= 1:
        yield f"objective.lam_actor: got {objective.lam_actor}, expected a number in [0, 1]"
    if not 0 <= objective.positive_nll < math.inf:
        yield f"objective.positive_nll: got {objective.positive_nll}, expected at least 0"


def _critic(config: Config, critic: CriticConfig) -> Iterator[str]:
    above_zero = [("critic.lr", critic.lr), ("critic.grad_clip", critic.grad_clip)]
    if critic.value_clip is not None:
        above_zero.append(("critic.value_clip", critic.value_clip))
    at_least: list[tuple[str, float, float]] = [
        ("critic.warmup_steps", critic.warmup_steps, 0),
        ("critic.weight_decay", critic.weight_decay, 0),
        ("critic.pretrain_steps", critic.pretrain_steps, 0),
    ]
    if critic.level_off is not None:
        at_least.append(("critic.level_off.window", critic.level_off.window, 1))
        above_zero += [
            ("critic.level_off.loss", critic.level_off.loss),
            ("critic.level_off.explained_variance", critic.level_off.explained_variance),
        ]
    for name, got, low in at_least:
        if not low <= got < math.inf:
            yield f"{name}: got {got}, expected at least {low}"
    for name, got in above_zero:
        if not 0 < got < math.inf:
            yield f"{name}: got {got}, expected a positive number"
    if not all(0 <= beta < 1 for beta in critic.betas):
        yield f"critic.betas: got {list(critic.betas)}, expected two numbers in [0, 1)"
    if not isinstance(config.objective, PpoObjective):
        return  # the settings are for `headrace pretrain-critic`
    if critic.pretrain_steps > config.steps:
        yield (
            f"critic.pretrain_steps = {critic.pretrain_steps} exceeds steps = {config.steps}: the policy would never be trained"
        )
    if critic.level_off is None:
        return
    needed = 2 * critic.level_off.window
    if critic.pretrain_steps == 0:
        yield "critic.level_off is set, but critic.pretrain_steps = 0: there is no value pretraining that it could end"
    elif needed > critic.pretrain_steps:
        yield (
            f"critic.level_off.window = {critic.level_off.window} needs {needed} steps to compare two windows, more than "
            f"critic.pretrain_steps = {critic.pretrain_steps}: it could never end it"
        )
