"""What SGLang says of a request while it runs: events of a stream, and the tokens, log-probabilities and versions in them.

An event carries the new tokens or all of them, as the server was started (`--incremental-streaming-output`); one that says
that a waiting request was aborted repeats the last token and all log-probabilities. `completion_tokens` counts rightly in
every case, so what is new is taken from the end.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from engine.generate_requests import EngineLost, Progress

Pair = tuple[float | None, int, Any]
"""Log-probability (None for NaN, and for a prompt's first token), token, text."""


class Reason(Struct):
    """Why a request ended: "stop", "length" or "abort"."""

    type: str
    message: str | None = None


class Span(Struct):
    """Tokens [start, end) of a response were sampled under `version`."""

    version: str
    start: int
    end: int


class Meta(Struct):
    weight_version: str
    finish_reason: Reason | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    weight_versions: list[Span] | None = None
    output_token_logprobs: list[Pair] = []
    input_token_logprobs: list[Pair] | None = None


class Event(Struct):
    output_ids: list[int]
    meta_info: Meta


class Stream:
    """One request's events, in order, to `Progress`."""

    def __init__(self, request: str, *, of_prompt: bool = False) -> None:
        """`of_prompt`: whether the prompt's log-probabilities were asked for."""
        self.request, self._of_prompt = request, of_prompt
        self._count = 0
        self._runs: list[tuple[int, int]] = []
        self._version = -1

    def take(self, data: bytes) -> Progress:
        """Raises `EngineLost` for an event that does not follow from those before."""
        try:
            event = msgspec.json.decode(data, type=Event)
        except msgspec.DecodeError as error:
            raise EngineLost(f"SGLang sent an event of no known form: {error}: {data[:300]!r}") from error
        meta = event.meta_info
        new = meta.completion_tokens - self._count
        pairs = meta.output_token_logprobs[len(meta.output_token_logprobs) - new :] if new > 0 else []
        tokens = event.output_ids[len(event.output_ids) - new :] if new > 0 else []
        if new < 0 or tokens != [token for _, token, _ in pairs] or len(tokens) != new:
            raise EngineLost(
                f"SGLang sent tokens {tokens[:5]} with log-probabilities of {[pair[1] for pair in pairs[:5]]} after "
                f"{self._count} of {meta.completion_tokens}; expected as many of each"
            )
        self._count += new
        self._label(meta, new)
        return Progress(
            self.request,
            tokens,
            [_number(pair) for pair in pairs],
            None if meta.finish_reason is None else meta.finish_reason.type,
            meta.cached_tokens,
            self._prompt(meta),
            list(self._runs),
        )

    def _label(self, meta: Meta, new: int) -> None:
        """By the spans once there are any: these come with the end, and are right. Until then by the version that the server
        had when it sent the event, which is right but for tokens that came together with some of the version before."""
        if meta.weight_versions is not None:
            spans = [span for span in meta.weight_versions if span.end > span.start]
            self._runs = [(_version(span.version), span.end - span.start) for span in spans]
            if sum(count for _, count in self._runs) != self._count:
                raise EngineLost(f"SGLang labels {meta.weight_versions}, expected spans over {self._count} tokens")
            return
        if not new:
            return
        version = _version(meta.weight_version)
        label = self._version if new > 1 and self._runs else version
        self._version = version
        if self._runs and self._runs[-1][0] == label:
            new += self._runs.pop()[1]
        self._runs.append((label, new))

    def _prompt(self, meta: Meta) -> np.ndarray | None:
        if not self._of_prompt or meta.input_token_logprobs is None:
            return None
        return np.array([_number(pair) for pair in meta.input_token_logprobs[1:]], dtype=np.float32)


def _number(pair: Pair) -> float:
    return float("nan") if pair[0] is None else pair[0]


def _version(label: str) -> int:
    try:
        return int(label)
    except ValueError:
        raise EngineLost(f"SGLang labels tokens with version {label!r}, expected a number that it was given") from None
