"""Which device a name in a config means."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu"; any other name stays."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
