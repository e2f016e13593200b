"""How weights are kept aside and sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.devices import exact_device


@dataclass(frozen=True)
class Terms:
    """The same on all of the learner's `ranks`, of which each keeps a share of the weights and sends it.

    `device` is where weights lie aside: from a GPU they go over NCCL to members that have a GPU of their own, and over gloo to
    all others. With `in_host_memory` they lie on the CPU whatever they go over. They go in buckets of `bucket_bytes`. `sparse`
    sends a member that holds the version before only what changed, where that is less; it takes a second copy. Who is silent
    for `peer_timeout_s`, or hangs in a broadcast for as long, is dropped. Raises `ValueError` for sizes and times that are not
    above 0.
    """

    device: str = "cpu"
    bucket_bytes: int = 32 << 20
    peer_timeout_s: float = 60.0
    sparse: bool = False
    in_host_memory: bool = False
    ranks: int = 1

    def __post_init__(self) -> None:
        for name in ("bucket_bytes", "peer_timeout_s", "ranks"):
            if getattr(self, name) <= 0:
                raise ValueError(f"weights: got {name} {getattr(self, name)}, expected more than 0")

    @property
    def kept_on(self) -> torch.device:
        """Where weights lie aside."""
        return torch.device("cpu") if self.in_host_memory else exact_device(self.device)
