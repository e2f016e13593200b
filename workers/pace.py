"""From a run's config to the ledger's settings. No torch here."""

from __future__ import annotations

from engine.config import Config
from protocols.ledger import Pace


def pace_of(config: Config) -> Pace:
    """The ledger's settings of a run."""
    return Pace(
        steps=config.steps,
        groups_per_step=config.buffer.groups_per_step,
        max_lag=config.buffer.max_lag,
        dynamic_sampling=config.buffer.dynamic_sampling,
        max_oversample=config.buffer.max_oversample,
        lease_s=config.buffer.lease_s,
        # A worker is within its lease even if every task that it holds runs into the time limit.
        grade_lease_s=config.reward.tasks_per_scorer * config.reward.timeout_s + 30,
        grade_attempts=config.reward.attempts,
    )
