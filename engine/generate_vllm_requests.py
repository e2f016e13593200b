"""What the generator and vLLM say to each other, in words that need no vLLM."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DRAWS = "headrace"
"""The name under which a request's `extra_args` carry its `Draws`."""


class EngineLost(RuntimeError):
    """vLLM has failed, does not answer or computes something else than the weights say; it is not used again."""


class Draws(NamedTuple):
    """How a request's tokens are drawn, see `engine.sampling`; `made` of its response's tokens are in its prompt."""

    key: int
    made: int
    temperature: float
    top_p: float
    top_k: int


class Progress(NamedTuple):
    """What one step gave of one request. `finish` is vLLM's reason once the request has ended; `prompt_logprobs` are of
    all its prompt's tokens but the first, and `cached` of them were not computed anew."""

    request: str
    tokens: list[int]
    logprobs: list[float]
    finish: str | None
    cached: int
    prompt_logprobs: np.ndarray | None
