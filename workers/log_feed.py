"""A trainer's feed from a stored log: the plans as they were, and their groups."""

from __future__ import annotations

from collections.abc import Mapping

from protocols import messages as m
from protocols.log import LogReader


class LogFeed:
    """`last` is the last step that is fed; `expected` are hashes that the trainer itself must come to, by step."""

    def __init__(self, log: LogReader, *, last: int, expected: Mapping[int, str] | None = None) -> None:
        self.log, self.last, self.expected = log, last, expected or {}

    def plan(self, step: int) -> m.Plan:
        """A step that was left without groups has an empty plan. Raises `LogError` when a group is not in the log."""
        groups = self.log.plan(step) or []
        return m.Plan(
            step=step,
            groups=self.log.sizes(groups) if groups else [],
            weights_hash=self.expected.get(step),
            last=step == self.last,
        )

    def pull(self, step: int, groups: list[int]) -> m.Batch:
        """Raises `LogError` for groups that are damaged or not in the log."""
        return self.log.batch(step, groups)
