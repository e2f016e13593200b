"""What DAPO does with rewards before anything is trained: the soft overlong punishment and the dynamic-sampling filter.

No torch: the buffer and the reward workers use these.
"""

from __future__ import annotations

from collections.abc import Sequence


def overlong_penalty(length: int, *, max_length: int, cache: int) -> float:
    """DAPO's soft overlong punishment of a response of `length` tokens (eq. 13), in [-1, 0].

    0 up to `max_length - cache` tokens, then linearly down to -1 at `max_length` and beyond. The paper's numbers are
    `max_length` 20480 and `cache` 4096. Raises ValueError when the cache is not within the length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"overlong_penalty: cache: got {cache}, expected 1 to max_length = {max_length}")
    return 0.0 - min(max((length - (max_length - cache)) / cache, 0.0), 1.0)


def informative(correct: Sequence[bool]) -> bool:
    """DAPO's dynamic-sampling filter, 0 < #correct < G (eq. 11), on raw accuracy.

    `correct` are a group's verdicts. A group that is all right or all wrong has no signal; so has a group of one. Shaped
    rewards must not be given here: they differ within all-wrong groups of different lengths.
    """
    right = sum(map(bool, correct))
    return 0 < right < len(correct)
