"""How long value pretraining goes on: a fixed number of steps, or until the critic has learnt what it can. No torch here."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from engine.config import CriticConfig, LevelOff


class Levelling:
    """The figures of the last two windows; see `LevelOff` for the rule."""

    def __init__(self, rule: LevelOff, losses: list[float] | None = None, explained: list[float] | None = None) -> None:
        self.rule, self.losses, self.explained = rule, losses or [], explained or []

    def add(self, loss: float, explained_variance: float) -> None:
        """One more measurement."""
        kept = 2 * self.rule.window - 1
        self.losses = [*self.losses[-kept:], loss]
        self.explained = [*self.explained[-kept:], explained_variance]

    @property
    def level(self) -> bool:
        """Whether both have levelled off. A variance that is not known (NaN) has not."""
        window = self.rule.window
        if len(self.losses) < 2 * window:
            return False
        before, after = (math.fsum(part) / window for part in (self.losses[:window], self.losses[window:]))
        earlier, later = (math.fsum(part) / window for part in (self.explained[:window], self.explained[window:]))
        return (
            abs(after - before) <= self.rule.loss * abs(before) and abs(later - earlier) <= self.rule.explained_variance
        )


class Progress(msgspec.Struct):
    """What a checkpoint keeps of value pretraining."""

    steps: int = 0
    over: bool = False
    losses: list[float] = []
    explained: list[float | None] = []


class Pretraining:
    """Whether a step trains only the critic. It follows from the steps before it alone, so steps that are trained again
    from the log, or from a checkpoint, come to the same answer."""

    def __init__(self, config: CriticConfig | None) -> None:
        self.limit = config.pretrain_steps if config is not None else 0
        self.levelling = Levelling(config.level_off) if config is not None and config.level_off is not None else None
        self.steps = 0
        self.over = self.limit == 0

    def add(self, metrics: dict[str, float]) -> None:
        """A step of value pretraining with these metrics has been made."""
        self.steps += 1
        if self.levelling is not None and metrics["updates"] > 0:
            self.levelling.add(metrics["value_loss"], metrics["explained_variance"])
            self.over = self.levelling.level
        self.over = self.over or self.steps >= self.limit

    def state(self) -> dict[str, Any]:
        """As JSON data, for a checkpoint."""
        losses, explained = (self.levelling.losses, self.levelling.explained) if self.levelling else ([], [])
        known = [None if math.isnan(value) else value for value in explained]
        return msgspec.to_builtins(Progress(self.steps, self.over, losses, known))

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state()`. Raises `msgspec.ValidationError` for anything else."""
        found = msgspec.convert(state, Progress)
        self.steps, self.over = found.steps, found.over
        if self.levelling is not None:
            explained = [math.nan if value is None else value for value in found.explained]
            self.levelling = Levelling(self.levelling.rule, found.losses, explained)
