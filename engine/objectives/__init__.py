"""What is minimised: targets from a batch, losses from what the policy and the critic say of it."""

from __future__ import annotations

from engine.config import CollectObjective, Config, DapoObjective, PpoObjective, SftObjective
from engine.objectives.dapo import Dapo
from engine.objectives.plain import Collect, Sft
from engine.objectives.ppo import Ppo, ValuePretraining
from engine.objectives.targets import Objective, Sums, Targets, Totals

__all__ = [
    "Collect", "Dapo", "Objective", "Ppo", "Sft", "Sums", "Targets", "Totals", "ValuePretraining", "make_objective",
    "make_pretraining",
]  # fmt: skip


def make_objective(config: Config) -> Objective:
    """The objective that the config names."""
    match config.objective:
        case DapoObjective() as dapo:
            return Dapo(dapo, max_lag=config.buffer.max_lag)
        case PpoObjective() as ppo:
            clip = config.critic.value_clip if config.critic is not None else None
            return Ppo(ppo, max_lag=config.buffer.max_lag, value_clip=clip)
        case SftObjective():
            return Sft()
        case CollectObjective():
            return Collect()
    raise ValueError(f"objective {config.objective.__struct_config__.tag}: got one of UTel's, expected a policy's")


def make_pretraining(config: Config) -> Objective:
    """The objective of the steps that train only the critic."""
    ppo = config.objective if isinstance(config.objective, PpoObjective) else PpoObjective(loss="token")
    return ValuePretraining(loss=ppo.loss, overlong_filter=ppo.overlong_filter)
