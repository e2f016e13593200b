"""What a generator and the engine below it say to each other, in words that need no engine."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

DRAWS = "headrace"
"""The name under which a request's `extra_args` carry its `Draws` in vLLM."""


class EngineLost(RuntimeError):
    """The engine has failed, does not answer or computes something else than the weights say; it is not used again."""


class Draws(NamedTuple):
    """How a request's tokens are drawn, see `engine.sampling`; `made` of its response's tokens are in its prompt."""

    key: int
    made: int
    temperature: float
    top_p: float
    top_k: int


class Progress(NamedTuple):
    """What one step gave of one request. `finish` is the engine's reason once the request has ended; `prompt_logprobs` are
    of all its prompt's tokens but the first, and `cached` of them were not computed anew. `versions` are runs over all of
    the request's tokens so far, from engines that say them; otherwise these are of the weights that were applied last."""

    request: str
    tokens: list[int]
    logprobs: list[float]
    finish: str | None
    cached: int
    prompt_logprobs: np.ndarray | None = None
    versions: list[tuple[int, int]] | None = None


class Engine(Protocol):
    """Batches requests and computes their tokens. Everything raises `EngineLost`, but for the last three."""

    name: str
    recomputes: bool
    """Whether `apply` can have keys and values of requests in flight computed anew; otherwise they are made anew."""

    def add(self, request: str, prompt: list[int], *, tokens: int, draws: Draws, share: str) -> None:
        """Continue `prompt` by at most `tokens`. Keys and values are shared among requests of equal `share`."""

    def add_canary(self, request: str, prompt: list[int], *, draws: Draws, share: str) -> None:
        """One token, and the log-probabilities of the whole prompt."""

    def step(self) -> list[Progress]:
        """What is new of the requests; returns within a moment, with nothing if there is nothing."""

    def apply(self, version: int, *, recompute: bool) -> None:
        """Serve the staged weights from now on, as `version`; requests go on with the keys and values that they have,
        or, with `recompute`, with such of the new weights."""

    def check(self) -> None:
        """Costs nothing; raises when the engine has ended."""

    def abort(self, requests: list[str]) -> None:
        """Forget these. Nothing to do for an engine that is lost."""

    def recall(self, requests: list[str]) -> list[Progress]:
        """As `abort`, but once nothing is under way: returns what was computed and `step` had not yet, also of other
        requests, or that these have finished."""

    def close(self) -> None:
        """End it, whatever state it is in."""
