"""What a scorer says of a response. No torch here."""

from __future__ import annotations

from msgspec import Struct


class RewardError(ValueError):
    """This response cannot be scored: the data row, the data set or the user's function is at fault, not the response."""


class Score(Struct, frozen=True):
    """`correct` is raw accuracy; `value` is the scorer's own figure (1 or 0 where it only says yes or no); `reward` is
    set by a user's function that says itself what is trained on; `detail` is what is to be known beside the figures."""

    correct: bool
    value: float
    parts: dict[str, float] = {}
    reward: float | None = None
    detail: str = ""
