"""Which roles are started anew, when, and when to give up: what the launcher decides, without a process or a clock."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from workers.roles import role_of
from workers.supervise import Exit


class Patience(Struct, frozen=True):
    """How long the launcher waits, in seconds, and how often it starts a role anew."""

    model_s: float = 600.0
    address_s: float = 180.0
    leave_s: float = 15.0
    """For workers to leave after the run's end, and for the buffer of a launcher that was killed."""
    checkpoint_s: float = 600.0
    """For the learner to write its last checkpoint after the run's end."""
    term_s: float = 15.0
    abandoned_s: float = 2.0
    """In place of `term_s` when the buffer is gone for good."""
    attempts: int = 5
    backoff_s: float = 1.0
    healthy_s: float = 300.0
    """A role that lived this long has its attempts back, and so has one by whose work the run got further."""


class Again(Struct, frozen=True):
    """Start it anew after `delay_s`, for the `attempt`th time in a row."""

    delay_s: float
    attempt: int


class GivenUp(Struct, frozen=True):
    """It ended `attempts` times; `others` of its kind are left to go on with, or none."""

    attempts: int
    others: list[str]


class Restarts:
    """What each role has used of its attempts. Times are the caller's monotonic seconds."""

    def __init__(self, names: Sequence[str], patience: Patience) -> None:
        self._names, self._patience = list(names), patience
        self._attempts: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._lost: set[str] = set()
        self._left: set[str] = set()

    def resize(self, names: Sequence[str]) -> None:
        """These are the roles from now on: what is known of others, and that one was given up, is forgotten."""
        self._names = list(names)
        self._due = {name: when for name, when in self._due.items() if name in names or name == "buffer"}
        self._left &= set(names)
        for name in self._lost:
            self._attempts.pop(name, None)
        self._lost.clear()

    def pending(self, name: str) -> bool:
        """Whether its next start is only a matter of time."""
        return name in self._due

    def left(self, name: str) -> None:
        """A role went because it was told to."""
        self._left.add(name)

    def ended(self, exit: Exit, now: float, *, worked: bool = False) -> Again | GivenUp:
        """A role ended that should not have. `worked`: the run got further by what it did since it was started, so that
        however often it ends, the run comes to its end too."""
        healthy = worked or exit.lived_s >= self._patience.healthy_s
        attempt = 1 if healthy else self._attempts.get(exit.name, 0) + 1
        self._attempts[exit.name] = attempt
        if attempt > self._patience.attempts:
            self._lost.add(exit.name)
            role = role_of(exit.name)
            return GivenUp(attempt, [name for name in self._names if role_of(name) == role and name not in self._lost])
        delay_s = self._patience.backoff_s * 2 ** (attempt - 1)
        self._due[exit.name] = now + delay_s
        if exit.name == "buffer":  # a buffer that is told to stop says goodbye to all, and comes back without them
            self._due |= dict.fromkeys(self._left, now + delay_s)
            self._left.clear()
        return Again(delay_s, attempt)

    def due(self, now: float) -> list[str]:
        """The roles whose time has come, each named once."""
        names = [name for name, when in self._due.items() if when <= now]
        for name in names:
            del self._due[name]
        return names
