"""The share of a rank that has no group. No torch here."""

from __future__ import annotations

import numpy as np

from protocols import messages as m


def empty_batch(step: int) -> m.Batch:
    """The share of a rank that has no group in an update; it takes part in the collectives all the same."""
    ints, floats, bools = np.zeros(0, m.INT), np.zeros(0, m.FLOAT), np.zeros(0, m.BOOL)
    return m.Batch(
        step=step, groups=ints, prompt_lengths=ints, prompts=ints, sizes=ints, lengths=ints, tokens=ints,
        logprobs=floats, versions=ints, rewards=floats, correct=bools, truncated=bools,
    )  # fmt: skip
