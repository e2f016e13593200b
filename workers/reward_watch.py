"""Notices that nothing can be graded, so that a broken reward ends the run instead of wasting it. No torch here."""

from __future__ import annotations

from protocols.messages import Grade

GROUPS_IN_A_ROW = 3
"""One prompt may hang a grader with all its samples; that several do in a row, with no verdict on anything else in
between, is the reward's fault."""


class RewardsBroken(RuntimeError):
    """No response can be graded; says how many failed in a row and why the last one did. Starting anew cannot help."""


class RewardWatch:
    """Feed it every grade that counts."""

    def __init__(self, *, samples_per_group: int, attempts: int) -> None:
        self.limit = GROUPS_IN_A_ROW * samples_per_group * attempts
        self.failed = 0
        self._last = ""
        self._said = False

    def saw(self, grade: Grade) -> str | None:
        """Counts it; returns what is to be said at the first failure of all."""
        if grade.verdict == "graded":
            self.failed = 0
            return None
        self.failed += 1
        self._last = f"group {grade.group} sample {grade.sample}: {grade.verdict}: {grade.detail}"
        first, self._said = not self._said, True
        return f"not graded: {self._last}" if first else None

    def check(self) -> None:
        """Raises `RewardsBroken` when too many in a row have failed."""
        if self.failed >= self.limit:
            raise RewardsBroken(
                f"the reward cannot grade: {self.failed} attempts in a row failed, expected a verdict on some; the last, "
                f"{self._last}"
            )
