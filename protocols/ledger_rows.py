"""What the ledger is set to, what it says, and what it keeps of each sample, group and worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

Kind = Literal["train", "eval", "ready"]
Stage = Literal["new", "leased", "rolled", "grading", "graded", "failed"]


class Pace(Struct, frozen=True):
    """The settings of a ledger. Times in seconds; `steps` rollout steps in all."""

    steps: int
    groups_per_step: int
    max_lag: int
    dynamic_sampling: bool = True
    max_oversample: float = 3.0
    lease_s: float = 60.0
    grade_lease_s: float = 60.0
    grade_attempts: int = 2

    def __post_init__(self) -> None:
        if self.groups_per_step < 1 or self.max_lag < 0 or self.max_oversample < 1 or self.grade_attempts < 1:
            raise ValueError(f"pace: expected groups_per_step >= 1, max_lag >= 0, max_oversample >= 1, got {self}")


class Issue(Struct, frozen=True):
    """Send a ticket for these samples to this generator."""

    worker: str
    group: int
    samples: list[int]
    fence: int
    min_version: int


class Score(Struct, frozen=True):
    """Send this sample to this reward worker."""

    worker: str
    group: int
    sample: int
    attempt: int


class Decided(Struct, frozen=True):
    """All samples of a group have ended. `outcome` "ready" goes to training, the others leave the system now."""

    group: int
    kind: Kind
    outcome: Literal["ready", "dropped", "failed", "evaluated"]
    reason: str | None = None


Decision = Issue | Score | Decided


@dataclass(slots=True)
class Sample:
    stage: Stage = "new"
    fence: int = -1
    worker: str = ""
    deadline: float = 0.0
    attempt: int = 0
    failures: int = 0
    correct: bool = False
    tokens: int = 0


@dataclass(slots=True)
class Group:
    id: int
    kind: Kind
    samples: list[Sample]
    min_version: int
    fence: int

    @property
    def graded(self) -> list[Sample]:
        return [s for s in self.samples if s.stage == "graded"]

    @property
    def ended(self) -> bool:
        return all(s.stage in ("graded", "failed") for s in self.samples)


@dataclass(slots=True)
class Worker:
    role: str
    capacity: int
    outstanding: set[tuple[int, int]] = field(default_factory=set)
    suspect: bool = False
    version: int | None = None
    """Of the weights that a generator serves, as it said last."""

    @property
    def free(self) -> int:
        """How many samples or grade tasks it may be given now: none while it is not heard, or has no weights to sample with."""
        if self.suspect or (self.role == "generator" and self.version is None):
            return 0
        return max(0, self.capacity - len(self.outstanding))
