"""DAPO and GRPO: advantages from the rewards of a group."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from engine.advantages import group_advantages
from engine.config import DapoObjective
from engine.objectives.surrogate import Surrogate
from engine.objectives.targets import Targets
from protocols.messages import Batch


class Dapo(Surrogate):
    """DAPO (arXiv 2503.14476) and, by its settings, GRPO: group-normalised advantages on the shaped reward."""

    value_loss = None

    def __init__(self, config: DapoObjective, *, max_lag: int) -> None:
        super().__init__(config, max_lag=max_lag)
        self.normalize_std = config.normalize_std

    def prepare(self, batch: Batch, step: int, values: np.ndarray | None) -> Targets:
        """See `Surrogate.targets`."""
        targets = self.targets(batch, step)
        groups = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
        advantages = group_advantages(
            torch.tensor(batch.rewards), torch.from_numpy(groups), normalize_std=self.normalize_std
        ).numpy()
        return replace(targets, columns=targets.columns | {"advantages": np.repeat(advantages, batch.lengths)})
