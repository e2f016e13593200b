"""What a critic is pretrained on: the groups of a stored run's steps, some of them held out. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from protocols import messages as m
from workers.no_data import empty_batch
from workers.replay_source import ReplayError, StoredRun

HELD_OUT = 10
"""One group in so many is held out, by a hash of its id."""
PAGE = 32
"""Groups that are read at a time where they are only measured."""
MEASURED = 256
"""Held-out groups that a measurement reads at most."""


class StoredGroups:
    """The planned groups of a run by id (8 bytes each; what they hold is read when it is wanted)."""

    def __init__(self, source: StoredRun) -> None:
        """Raises `ReplayError` for a log without groups, or with too few to hold some out."""
        self.log = source.log
        rows = self.log.query("SELECT step, group_id FROM plan ORDER BY step, position")
        if not rows:
            raise ReplayError(f"{self.log.path}: no step is planned, so there is no group to learn from")
        steps, groups = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        out = np.array([is_held_out(group) for group in groups.tolist()], bool)
        self.held_out, self.groups, self.steps = groups[out], groups[~out], steps[~out]
        if not len(self.held_out) or not len(self.groups):
            raise ReplayError(
                f"{self.log.path}: it has {len(rows)} planned groups, of which {len(self.held_out)} are held out (one in "
                f"{HELD_OUT}, by a hash); expected some on either side"
            )

    @property
    def measured(self) -> np.ndarray:
        """The held-out groups that are measured."""
        return self.held_out[:MEASURED]

    def steps_of(self, epoch: int, seed: int) -> Iterator[list[int]]:
        """The training groups of each step of an epoch (from 0): as they were logged, later shuffled anew, into as many
        steps of about as many groups."""
        edges = np.flatnonzero(np.diff(self.steps)) + 1
        order = self.groups
        if epoch:
            order = np.random.default_rng([seed, epoch]).permutation(order)
            edges = np.linspace(0, len(order), len(edges) + 2).round().astype(np.int64)[1:-1]
        yield from (part.tolist() for part in np.split(order, edges) if len(part))

    def sizes(self, groups: list[int]) -> list[m.GroupSize]:
        """Raises `ReplayError` for a group without a graded response."""
        found = self.log.sizes(groups)
        for size in found:
            if not size.response_tokens:
                raise ReplayError(
                    f"{self.log.path}: group {size.group} has no graded response; expected a reward for each planned group"
                )
        return found

    def pages(self, groups: np.ndarray, *, rank: int = 0, world: int = 1) -> Iterator[m.Batch]:
        """This rank's share of `groups`, a page at a time; every rank has as many pages, of which the last may be empty."""
        own = groups[rank::world].tolist()
        for first in range(0, -(-len(groups) // world), PAGE):
            page = own[first : first + PAGE]
            self.sizes(page)
            yield self.log.batch(1, page) if page else empty_batch(1)


def is_held_out(group: int) -> bool:
    """Whether a group is held out, in every command that looks at the same log."""
    return xxhash.xxh3_64_intdigest(group.to_bytes(8, "little")) % HELD_OUT == 0
