"""Ranks that train together must be alike: another version or type on one of them would show as other weights, or as a hang."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from engine.config import ConfigError
from engine.trained_model import Ranks

LONGEST = 512
"""Bytes that a rank may say of itself."""


def check_same_versions(ranks: Ranks, device: torch.device | str, versions: Mapping[str, str]) -> None:
    """Raises `ConfigError` on every rank, naming both sides, unless all ranks have the same `versions`. All ranks call it."""
    if ranks.world == 1:
        return
    own = ", ".join(f"{name} {value}" for name, value in versions.items()).encode()[:LONGEST]
    said = torch.zeros(LONGEST, dtype=torch.uint8)
    said[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    everywhere = [torch.zeros(LONGEST, dtype=torch.uint8, device=device) for _ in range(ranks.world)]
    dist.all_gather(everywhere, said.to(device), group=ranks.group)
    texts = [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in everywhere]
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ConfigError(
                f"learner ranks differ: rank 0 has {texts[0]}; rank {rank} has {text}; expected the same on all {ranks.world}"
            )
