"""What a plan is reckoned from: the time that each part takes by itself, and the work that comes.

Nothing here says how fast a run is, how long anybody waits or how old tokens get; that comes out of the simulation.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct


class GeneratorCost(Struct, frozen=True):
    """One generator. A decode pass makes one token of each live sequence."""

    slots: int
    passes: list[tuple[float, float]]
    """(live sequences, seconds of a decode pass), rising in the first; on straight lines between, level outside."""
    prefill_token_seconds: float = 0.0
    """Seconds that all live sequences wait for one prompt token; 0 where the passes contain it."""
    adopt_seconds: float = 0.0
    """Seconds that decoding stands still for new weights."""
    recompute: bool = False
    """Whether new weights also cost a prefill of all live tokens."""
    gpus: int = 1

    def __post_init__(self) -> None:
        live = [n for n, _ in self.passes]
        if self.slots < 1 or not live or live != sorted(set(live)) or min(s for _, s in self.passes) <= 0:
            raise ValueError(
                f"generator: expected slots >= 1 and passes of rising counts and positive seconds, got {self}"
            )

    def pass_seconds(self) -> np.ndarray:
        """[slots + 1]: seconds of a pass with so many live sequences."""
        counts, seconds = zip(*self.passes, strict=True)
        return np.interp(np.arange(self.slots + 1), counts, seconds)


class LearnerCost(Struct, frozen=True):
    """One learner, whatever its ranks: `fixed_seconds + token_seconds * tokens` train a step, prompts counted once a group."""

    token_seconds: float
    fixed_seconds: float = 0.0
    pull_seconds: float = 0.0
    """From a plan that can be made to the start of training."""
    commit_seconds: float = 0.0
    """From the end of training until the step is in the log."""
    publish_seconds: float = 0.0
    """From then until the learner asks for the next step."""
    unevenness: tuple[float, ...] = (1.0,)
    """Factors on the time of training, drawn for each step: those that were recorded."""

    def __post_init__(self) -> None:
        if min(self.token_seconds, self.fixed_seconds, *self.unevenness) < 0 or not self.unevenness:
            raise ValueError(f"learner: expected seconds of at least 0 and a factor, got {self}")


class RewardCost(Struct, frozen=True):
    """`workers` reward workers of `scorers` each; every grade takes a scorer `score_seconds`, and `delay_seconds` on its way."""

    workers: int = 1
    scorers: int = 1
    tasks_per_scorer: int = 16
    score_seconds: float = 0.0
    delay_seconds: float = 0.0


class Costs(Struct, frozen=True):
    """Everything that takes time. `sync_seconds`: from a step's commit until generators serve its weights."""

    generators: list[GeneratorCost]
    learner: LearnerCost
    reward: RewardCost = RewardCost()
    sync_seconds: float = 0.0
    send_seconds: float = 0.0
    """From a finished response to the buffer, and from the buffer to a generator."""
    turn_seconds: float = 0.0
    """Events that come within this time are one turn of the buffer."""


class Group(Struct, frozen=True):
    """One prompt's work: its tokens, its responses' tokens, and whether each is right."""

    prompt: int
    lengths: list[int]
    correct: list[bool]

    @property
    def tokens(self) -> int:
        """What a learner computes: the prompt once, and all responses."""
        return self.prompt + sum(self.lengths)


class Lognormal(Struct, frozen=True):
    """Response tokens around `median`, cut to `longest`; sigma 1.0 has the p99 at ten times the median, as the traces of
    Laminar (arXiv 2510.12633) do. A share `keep` of the groups has right and wrong answers."""

    median: float
    longest: int
    sigma: float = 1.0
    keep: float = 1.0
    prompt: int = 0

    def __post_init__(self) -> None:
        if self.median < 1 or self.longest < 1 or self.sigma < 0 or not 0 < self.keep <= 1:
            raise ValueError(
                f"lengths: expected median, longest >= 1, sigma >= 0 and keep above 0 and at most 1, got {self}"
            )

    def draw(self, rng: np.random.Generator, samples: int, place: int | None) -> Group:
        """A group; which one is a matter of chance alone."""
        lengths = np.exp(math.log(self.median) + self.sigma * rng.standard_normal(samples))
        kept = bool(rng.random() < self.keep)
        tokens = np.clip(np.rint(lengths), 1, self.longest).astype(int).tolist()
        return Group(self.prompt, tokens, [kept and i % 2 == 0 for i in range(samples)])

    @property
    def response(self) -> float:
        """Mean tokens of a response, from a fixed draw of many."""
        drawn = self.draw(np.random.default_rng(0), 20_000, None)
        return sum(drawn.lengths) / len(drawn.lengths)


class Recorded(Struct, frozen=True):
    """Groups of a run. `in_order`: the one that enters first is the first here, and from the start again when they are used
    up; otherwise each is drawn by chance."""

    groups: list[Group]
    in_order: bool = False

    def draw(self, rng: np.random.Generator, samples: int, place: int | None) -> Group:
        """The group for the `place`-th that enters for training; None for one of an evaluation, which has `samples` of
        the responses of one drawn by chance."""
        if self.in_order and place is not None:
            return self.groups[place % len(self.groups)]
        found = self.groups[int(rng.integers(len(self.groups)))]
        if len(found.lengths) == samples:
            return found
        chosen = rng.integers(len(found.lengths), size=samples).tolist()
        return Group(found.prompt, [found.lengths[i] for i in chosen], [found.correct[i] for i in chosen])

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt."""
        return sum(group.prompt for group in self.groups) / len(self.groups)

    @property
    def response(self) -> float:
        """Mean tokens of a response."""
        lengths = [length for group in self.groups for length in group.lengths]
        return sum(lengths) / len(lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(max(group.lengths) for group in self.groups)

    @property
    def keep(self) -> float:
        """The share of groups that dynamic sampling keeps."""
        return sum(any(g.correct) and not all(g.correct) for g in self.groups) / len(self.groups)


Work = Lognormal | Recorded
