"""What a regrade changed, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from protocols.log import GroupRow, Status
from protocols.messages import Grade, Rollout

EXAMPLES = 3
SHOWN = 160
"""Characters of a prompt's end and of a response's beginning."""


class Example(Struct, frozen=True):
    """A response that is judged otherwise now."""

    group: int
    sample: int
    prompt: str
    response: str
    before: str
    after: str


class Changes:
    """Counts over all responses that were graded anew."""

    def __init__(self) -> None:
        self.responses = 0
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.rewards: tuple[list[float], list[float]] = ([0.0, 0.0], [0.0, 0.0])
        """Sum and count, before and after."""
        self.groups: Counter[tuple[str, str]] = Counter()
        self.examples: list[Example] = []
        self.steps: list[str] = []
        self.evaluations: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])

    def add(
        self,
        row: GroupRow,
        rollouts: Mapping[int, Rollout],
        before: Iterable[Grade],
        after: Iterable[Grade],
        status: Status,
    ) -> None:
        """A group, with all attempts at grading it then and now, and what becomes of it."""
        was, now = final(before), final(after)
        for sample, rollout in sorted(rollouts.items()):
            self.responses += 1
            for sums, grade in zip(self.rewards, (was.get(sample), now.get(sample)), strict=True):
                if grade is not None and grade.verdict == "graded":
                    sums[0] += grade.reward
                    sums[1] += 1
            change = verdict(was.get(sample)), verdict(now.get(sample))
            if change[0] != change[1]:
                self.verdicts[change] += 1
                self._example(row, rollout, was.get(sample), now.get(sample))
        if row.kind != "eval":
            self.groups[row.status, "informative" if status == "waiting" else status] += 1

    def planned(self, steps: Mapping[int, list[int]], before: Set[int], informative: Set[int]) -> None:
        """The new plan: `steps` has every group that was or is planned, `informative` those that are kept."""
        after = {group for groups in steps.values() for group in groups} & informative
        empty = [step for step, groups in steps.items() if not informative & set(groups)]
        self.steps = [
            f"plan: {len(after):,} groups in {len(steps) - len(empty)} of {len(steps)} steps; {len(before & after):,} stay in "
            f"their step, {len(before - after):,} leave it, {len(after - before):,} come in"
        ]
        if late := len(informative - after):
            self.steps.append(
                f"plan: {late:,} informative groups came too late for every step; they are offline data only"
            )
        if empty:
            self.steps.append(f"plan: steps without a group train nothing: {', '.join(map(str, empty[:20]))}")

    def show(self, console: Console, folder: Path) -> None:
        """Prints the changes."""
        changed = sum(self.verdicts.values())
        lines = [f"{folder}: {self.responses:,} responses graded anew, {changed:,} of them otherwise than before"]
        lines += [f"  {was} -> {now}: {count:,}" for (was, now), count in self.verdicts.most_common()]
        means = [f"{total / count:.4f}" if count else "none" for total, count in self.rewards]
        lines.append(f"mean reward: {means[0]} before, {means[1]} after")
        lines += [f"groups {was} before, {now} now: {count:,}" for (was, now), count in sorted(self.groups.items())]
        lines += self.steps
        now = {e["eval_step"]: e["accuracy"] for e in self.evaluations[1]}
        lines += [
            f"held-out accuracy after step {e['eval_step']:.0f}: {e['accuracy']:.3f} before, {now[e['eval_step']]:.3f} after"
            for e in self.evaluations[0]
            if e["eval_step"] in now
        ]
        for example in self.examples:
            lines += [
                f"example: group {example.group} sample {example.sample}, {example.before} before, {example.after} now",
                f"  prompt   {example.prompt}",
                f"  response {example.response}",
            ]
        for line in lines:
            console.print(Text(line), soft_wrap=True)

    def _example(self, row: GroupRow, rollout: Rollout, was: Grade | None, now: Grade | None) -> None:
        if len(self.examples) < EXAMPLES:
            prompt, response = repr(row.prompt_text[-SHOWN:]), repr(rollout.text[:SHOWN])
            self.examples.append(Example(row.group, rollout.sample, prompt, response, _said(was), _said(now)))


def final(grades: Iterable[Grade]) -> dict[int, Grade]:
    """By sample the attempt that counts: the last graded one, else the last failure."""
    found: dict[int, Grade] = {}
    for grade in sorted(grades, key=lambda grade: (grade.verdict == "graded", grade.attempt)):
        found[grade.sample] = grade
    return found


def verdict(grade: Grade | None) -> str:
    """`right` or `wrong`, or why there is neither."""
    if grade is None:
        return "not graded"
    return ("right" if grade.correct else "wrong") if grade.verdict == "graded" else grade.verdict


def _said(grade: Grade | None) -> str:
    reward = f" (reward {grade.reward:g})" if grade is not None and grade.verdict == "graded" else ""
    return verdict(grade) + reward
