"""The only scheduler, as pure state: events in, decisions out, no I/O and no clock of its own.

A group's samples go `new -> leased -> rolled -> grading -> graded | failed`. When every sample has ended, the group is
decided: an uninformative one is dropped and frees its place at once, an informative one waits, first decided first
trained, until a step plans it and the learner commits that step.

`ledger_pacing` has the rule by which groups enter, `ledger_leases` who works on which sample and until when.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Literal

from protocols.ledger_leases import Leases
from protocols.ledger_pacing import Load, Pacing
from protocols.ledger_rows import Decided, Decision, Group, Issue, Kind, Pace, Sample, Score
from protocols.messages import Verdict

__all__ = ["Decided", "Decision", "Issue", "Kind", "Ledger", "Pace", "Score"]


class Ledger:
    """Feed it events; call `decide(now)` after each batch of them and carry out what it says."""

    def __init__(self, pace: Pace, *, first_fence: int = 0) -> None:
        """`first_fence` is above every fence that an earlier process of this run may have given out."""
        self.pace = pace
        self.first_fence = first_fence
        self.groups: dict[int, Group] = {}
        self.ready: OrderedDict[int, None] = OrderedDict()
        self.planned: dict[int, list[int]] = {}
        self.committed = 0
        self._evaluating = 0
        self._to_issue: deque[int] = deque()
        self._to_grade: deque[tuple[int, int]] = deque()
        self._decided: list[Decided] = []
        self._pacing = Pacing(pace)
        self._leases = Leases(pace, self.groups)
        self.workers = self._leases.workers
        self.totals = dict.fromkeys(("kept", "dropped", "failed", "reissued", "refused", "tokens", "dropped_tokens"), 0)
        self.fruitless = 0
        """Groups decided since the last informative one."""

    # --- what is known -------------------------------------------------------------------------------------------

    @property
    def keep(self) -> float:
        """The share of groups that dynamic sampling keeps, as the pacing rule takes it."""
        return self._pacing.keep

    @property
    def undecided(self) -> int:
        return len(self.groups) - len(self.ready) - self._evaluating

    @property
    def in_system(self) -> int:
        """Groups that were issued and are neither trained nor dropped (evaluation does not count)."""
        return self._load.in_system

    @property
    def _planned_count(self) -> int:
        return sum(len(groups) for groups in self.planned.values())

    @property
    def _load(self) -> Load:
        return Load(self.undecided, len(self.ready), self._planned_count, self.committed)

    def room(self) -> int:
        """How many training groups may enter now: the pacing rule, and what the run still needs."""
        return self._pacing.room(self._load)

    def min_version(self) -> int:
        """The oldest weights that may sample a group which enters now, for its turn to come within the lag."""
        return self._pacing.min_version(self._load)

    def appetite(self) -> int:
        """Samples that generators could start now and that no group waits to fill."""
        waiting = sum(sum(s.stage == "new" for s in self.groups[g].samples) for g in self._to_issue)
        return max(0, self._leases.free_generators() - waiting)

    def figures(self) -> dict[str, float]:
        """Plain numbers for metrics and the view."""
        decided = self.totals["kept"] + self.totals["dropped"]
        return {
            "in_system": self.in_system,
            "undecided": self.undecided,
            "ready": len(self.ready),
            "planned": self._planned_count,
            "to_grade": len(self._to_grade),
            "evaluating": self._evaluating,
            "keep_rate": self._pacing.measured,
            "keep_rate_total": self.totals["kept"] / decided if decided else 1.0,
            "fruitless": self.fruitless,
            "committed": self.committed,
            **{f"total_{name}": value for name, value in self.totals.items()},
        }

    def standing(self) -> dict[str, float]:
        """What holds a run up, beside `figures`: the rule's numbers, and the samples that each side owes."""
        stages = [s.stage for g in self.groups.values() for s in g.samples if g.id not in self.ready]
        return {
            "max_lag": self.pace.max_lag,
            "groups_per_step": self.pace.groups_per_step,
            "room": self.room(),
            "to_generate": stages.count("new"),
            "generating": stages.count("leased"),
            "grading": stages.count("grading"),
        }

    # --- events --------------------------------------------------------------------------------------------------

    def joined(self, worker: str, role: str, capacity: int) -> None:
        """A worker said hello; one that comes back under its name keeps its leases. A generator gets nothing until it has
        said, by `alive`, which weights it serves."""
        self._take_back_all(self._leases.joined(worker, role, capacity))

    def left(self, worker: str) -> None:
        """A worker is gone: what it held is issued anew, under a fence that refuses its late results."""
        self._take_back_all(self._leases.left(worker))

    def alive(self, worker: str, held: Iterable[tuple[int, int]], now: float, *, version: int | None = None) -> None:
        """A heartbeat: renews the leases of the (group, fence) pairs that the generator names. It gets tickets only while
        it serves weights of some `version`."""
        self._leases.alive(worker, held, now, version=version)

    def add_group(self, group: int, kind: Kind, samples: int, *, min_version: int = 0) -> None:
        """A prompt enters. `ready` groups (rows that come with their responses) wait for no generator and no reward."""
        self.groups[group] = Group(group, kind, [Sample() for _ in range(samples)], min_version, self.first_fence)
        if kind == "ready":
            for sample in self.groups[group].samples:
                sample.stage = "graded"
            self.ready[group] = None
        elif kind == "eval":
            self._evaluating += 1
            self._to_issue.appendleft(group)
        else:
            self._to_issue.append(group)

    def rollout(self, worker: str, group: int, sample: int, fence: int, tokens: int) -> str | None:
        """A finished response; returns why it is refused, or None when it counts."""
        found, refusal = self._leases.find(worker, group, sample, fence)
        if found is None:
            self.totals["refused"] += 1
            return refusal
        self._leases.end(worker, group, sample)
        self._rolled(group, sample, found, tokens)
        return None

    def hand_back(self, worker: str, group: int, fence: int, samples: Sequence[int]) -> str | None:
        """A leaving generator returns samples unfinished; returns why none of them is taken, or None."""
        refusal: str | None = "no samples"
        for index in samples:
            found, refusal = self._leases.find(worker, group, index, fence)
            if found is not None:
                self._leases.end(worker, group, index)
                self._take_back(self.groups[group], index)
        return refusal

    def grade(self, worker: str, group: int, sample: int, attempt: int, verdict: Verdict, correct: bool) -> str | None:
        """A verdict on one attempt; returns why it is refused, or None when it counts."""
        known = self.groups.get(group)
        if known is None or not 0 <= sample < len(known.samples):
            return f"group {group} sample {sample} is not waiting for a grade"
        found = known.samples[sample]
        if found.stage not in ("rolled", "grading") or found.attempt != attempt:
            return f"group {group} sample {sample}: attempt {attempt} is not the current one ({found.stage}, attempt {found.attempt})"
        self._leases.end(found.worker, group, sample)
        self._graded(known, sample, verdict, correct)
        return None

    def plan(self, step: int) -> list[int] | None:
        """The groups of `step`, or None while fewer than B are ready. Raises ValueError for a step out of turn."""
        if step in self.planned:
            return self.planned[step]
        if step != self.committed + 1 + len(self.planned) or step > self.pace.steps:
            raise ValueError(
                f"plan: got step {step}, expected {self.committed + 1 + len(self.planned)} of {self.pace.steps}"
            )
        if len(self.ready) < self.pace.groups_per_step:
            return None
        groups = [self.ready.popitem(last=False)[0] for _ in range(self.pace.groups_per_step)]
        for group in groups:
            del self.groups[group]
        self.planned[step] = groups
        return groups

    def commit(self, step: int) -> list[int]:
        """`step` is trained; returns its groups, or nothing when it was committed before. Raises ValueError out of turn."""
        if step <= self.committed:
            return []
        if step != self.committed + 1 or step not in self.planned:
            raise ValueError(f"commit: got step {step}, expected {self.committed + 1} and that it was planned")
        self.committed = step
        return self.planned.pop(step)

    # --- after a crash: the same state from the log ------------------------------------------------------------------

    def restore_rollout(self, group: int, sample: int, tokens: int) -> None:
        known = self.groups[group]
        self._rolled(group, sample, known.samples[sample], tokens)
        if group in self._to_issue and not any(s.stage == "new" for s in known.samples):
            self._to_issue.remove(group)  # it may be decided, and gone, before a generator joins

    def restore_grade(self, group: int, sample: int, attempt: int, verdict: str, correct: bool) -> None:
        known = self.groups[group]
        known.samples[sample].attempt = attempt
        self._graded(known, sample, verdict, correct)

    def restore_plan(self, step: int, groups: list[int]) -> None:
        """A step that was planned and not committed; its groups are not in `groups` any more."""
        self.planned[step] = groups

    # --- decisions ---------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Decision]:
        """Everything that follows from the events so far. Call it often: it also finds leases that ran out."""
        self._take_back_all(self._leases.expired(now))
        issued, scored = self._leases.issue(self._to_issue, now), self._leases.score(self._to_grade, now)
        decisions: list[Decision] = [*issued, *scored]
        decisions += self._decided
        self._decided = []
        return decisions

    # --- transitions -------------------------------------------------------------------------------------------------

    def _take_back_all(self, ended: Iterable[tuple[int, int]]) -> None:
        for group, index in ended:
            self._take_back(self.groups[group], index)

    def _take_back(self, group: Group, index: int) -> None:
        """A lease ended without a result: the sample goes back to the queue it came from, ahead of new work."""
        sample = group.samples[index]
        self.totals["reissued"] += 1
        if sample.stage == "grading":
            sample.stage, sample.attempt = "rolled", sample.attempt + 1
            self._to_grade.appendleft((group.id, index))
        else:
            sample.stage = "new"
            if group.id not in self._to_issue:
                self._to_issue.appendleft(group.id)

    def _rolled(self, group: int, index: int, sample: Sample, tokens: int) -> None:
        sample.stage, sample.tokens, sample.worker = "rolled", tokens, ""
        self.totals["tokens"] += tokens
        self._to_grade.append((group, index))

    def _graded(self, group: Group, index: int, verdict: str, correct: bool) -> None:
        sample = group.samples[index]
        if sample.stage == "rolled":  # a late verdict on an attempt that was already queued anew
            self._to_grade.remove((group.id, index))
        if verdict == "graded":
            sample.stage, sample.correct = "graded", correct
        else:
            sample.failures += 1
            sample.attempt += 1
            sample.stage = "failed" if sample.failures >= self.pace.grade_attempts else "rolled"
            if sample.stage == "rolled":
                self._to_grade.append((group.id, index))
        if group.ended:
            self._decide_group(group)

    def _decide_group(self, group: Group) -> None:
        """Dynamic sampling on raw accuracy (DAPO eq. 11). Failed samples are left out; fewer than two left fail the group."""
        right = [s.correct for s in group.graded]
        if group.kind == "eval":
            self._leave(group, "evaluated", None)
        elif len(right) < min(2, len(group.samples)):
            self.totals["failed"] += 1
            self._leave(
                group,
                "failed",
                f"{len(group.samples) - len(right)} of {len(group.samples)} samples could not be graded",
            )
        elif self.pace.dynamic_sampling and (all(right) or not any(right)):
            self._pacing.decided(False)
            self.fruitless += 1
            self.totals["dropped"] += 1
            self.totals["dropped_tokens"] += sum(s.tokens for s in group.samples)
            self._leave(group, "dropped", "all correct" if all(right) else "all wrong")
        else:
            self._pacing.decided(True)
            self.fruitless = 0
            self.totals["kept"] += 1
            self.ready[group.id] = None
            self._decided.append(Decided(group.id, group.kind, "ready"))

    def _leave(self, group: Group, outcome: Literal["dropped", "failed", "evaluated"], reason: str | None) -> None:
        del self.groups[group.id]
        self._evaluating -= group.kind == "eval"
        self._decided.append(Decided(group.id, group.kind, outcome, reason))
