"""How many groups may be under way: the pacing rule of the ledger, a function of what is there.

With B groups a step and a lag of L versions, a new group enters only while

    ready + planned + keep * undecided + keep <= (L + 1) * B      and      all of them <= oversample * (L + 1) * B

where `keep` is the measured share of groups that dynamic sampling keeps (1 while L = 0, which promises synchronous
training, so the bound is then exact). It cannot deadlock: with nothing undecided either a full step is ready or there
is room for a group, because keep <= 1 <= B.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from protocols.ledger_rows import Pace


class Load(Struct, frozen=True):
    """Groups in the system, evaluation left out, and the steps that are committed."""

    undecided: int
    ready: int
    planned: int
    committed: int

    @property
    def in_system(self) -> int:
        return self.undecided + self.ready + self.planned


class Pacing:
    """The rule, and the measurement that it needs."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._kept: deque[bool] = deque(maxlen=8 * pace.groups_per_step)

    def decided(self, kept: bool) -> None:
        """A training group turned out informative, or not."""
        self._kept.append(kept)

    @property
    def keep(self) -> float:
        """Measured share of kept groups over the last 8 steps' worth, starting from a prior of one step kept."""
        if self._pace.max_lag == 0 or not self._pace.dynamic_sampling:
            return 1.0
        prior = self._pace.groups_per_step
        rate = (sum(self._kept) + prior) / (len(self._kept) + prior)
        return max(rate, 1.0 / self._pace.max_oversample)

    @property
    def measured(self) -> float:
        """The same without prior and bound: 1 while nothing is decided."""
        return sum(self._kept) / len(self._kept) if self._kept else 1.0

    def room(self, load: Load) -> int:
        """How many training groups may enter now: the pacing rule, and what the run still needs."""
        pace = self._pace
        bound = (pace.max_lag + 1) * pace.groups_per_step
        needed = (pace.steps - load.committed) * pace.groups_per_step
        by_lag = int((min(bound, needed) - self._queued(load) + 1e-9) / self.keep)
        by_count = int(pace.max_oversample * bound) - load.in_system
        return max(0, min(by_lag, by_count))

    def min_version(self, load: Load) -> int:
        """The oldest weights that may sample a group which enters now, for its turn to come within the lag.

        Its step is committed + 1 + queued // B and trains on one version less. The pacing rule keeps queued below
        (L + 1) * B, so this is never a version that has not been published.
        """
        turn = load.committed + int((self._queued(load) + 1e-9) // self._pace.groups_per_step)
        return max(0, turn - self._pace.max_lag)

    def _queued(self, load: Load) -> float:
        """Groups that will be trained before one that enters now, as far as can be told."""
        return load.ready + load.planned + self.keep * load.undecided
