"""Which device a name in a config means."""

from __future__ import annotations

import os

import torch
import torch.distributed


def resolve_device(name: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu"; any other name stays."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_device(name: str) -> str:
    """The device of a learner's rank: as `resolve_device`, with the number of the card ("cuda": that of the local rank), which
    is this thread's current one from now on."""
    device = resolve_device(name)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return device


def collective_backend(device: str) -> str:
    """Of the process group of ranks that train on such devices."""
    return "nccl" if device.startswith("cuda") else "gloo"


def exact_device(name: str) -> torch.device:
    """With the number of the card, for threads whose current one is another."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def card_of(device: torch.device) -> str:
    """The id of a GPU over which NCCL can go, the same in every process; empty for a CPU, and where PyTorch has no NCCL."""
    if device.type != "cuda" or not torch.distributed.is_nccl_available():
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)
