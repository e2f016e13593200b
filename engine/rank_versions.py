"""Ranks that train together must be alike: another version or type on one of them would show as other weights, or as a hang."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.config import ConfigError
from engine.trained_model import Ranks


def check_same_versions(ranks: Ranks, device: torch.device | str, versions: Mapping[str, str]) -> None:
    """Raises `ConfigError` on every rank, naming both sides, unless all ranks have the same `versions`. All ranks call it."""
    texts = ranks.texts(", ".join(f"{name} {value}" for name, value in versions.items()), device)
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ConfigError(
                f"learner ranks differ: rank 0 has {texts[0]}; rank {rank} has {text}; expected the same on all {ranks.world}"
            )
