"""What a simulated run is set to, and what is noted of it."""

from __future__ import annotations

from msgspec import Struct

from protocols.ledger import Pace


class Evaluations(Struct, frozen=True):
    """Held-out prompts of every `every` steps, before the first and after the last; none with `prompts` 0."""

    prompts: int = 0
    samples: int = 1
    every: int = 0

    def due(self, step: int, steps: int) -> bool:
        return self.prompts > 0 and (step in (0, steps) or (self.every > 0 and step % self.every == 0))


class Setting(Struct, frozen=True):
    """What a run is: `pace` as for a real ledger."""

    pace: Pace
    samples: int
    evaluations: Evaluations = Evaluations()


class Snapshot(Struct, frozen=True):
    """Totals at a moment: seconds summed over generators, `samples` and `tokens` that the buffer took in, groups issued."""

    busy_seconds: float
    slot_seconds: float
    made: float
    samples: int
    tokens: int
    groups: int


class Step(Struct, frozen=True):
    """One trained step: when its training began and ended, how long the learner waited for it, tokens by lag, and totals
    at its beginning."""

    started: float
    finished: float
    committed: float
    waited: float
    groups: list[int]
    tokens: int
    lags: dict[int, float]
    in_system: int
    totals: Snapshot


class Simulated(Struct, frozen=True):
    """What happened. `generators` and `slots` are how many there were."""

    steps: list[Step]
    generators: int
    slots: int
    kept: int
    dropped: int
    most_in_system: int
