"""What a run is at this moment: the ledger that decides and the log that remembers, kept in step, without a link.

`workers/buffer.py` feeds it what workers send and sends what it returns. A refusal is a text; None means that it counts
(once `commit` has been called). No torch here.
"""

from __future__ import annotations

import sys
import time

import msgspec

from engine.config import Config, ConfigError
from protocols import messages as m
from protocols.ledger import Decided, Issue, Ledger, Score
from protocols.log import GroupRow
from workers.evaluations import Evaluations
from workers.intake import Intake
from workers.measure_pages import READ
from workers.metrics import MetricsWriter
from workers.pace import pace_of
from workers.provenance import code_version
from workers.reward_watch import RewardWatch
from workers.run_log import open_log

FENCES_PER_START = 1 << 20
"""Each process that serves a run gives out fences of its own range, so a zombie of an earlier one is refused."""
SAY_FRUITLESS = 10
"""After this many steps' worth of groups without an informative one, say so; the run goes on."""


class RunState:
    """Opens or makes the run's log and rebuilds the ledger from it. One thread only."""

    def __init__(self, config: Config, *, resume: bool = False) -> None:
        """Raises `ConfigError`, `TaskError` or `LogError` for what cannot be used; an old run is never overwritten."""
        self.config = config
        self.intake = Intake(config)
        self.rows: dict[int, GroupRow] = {}
        self.texts: dict[tuple[int, int], m.Rollout] = {}
        self.partials: dict[tuple[int, int], m.Partial] = {}
        self.evaluations = Evaluations(config, held_out=bool(self.intake.held_out))
        self.latest: dict[str, float] = {}
        self.next_group = 0
        self.said_fruitless = 0
        self.rewards = RewardWatch(samples_per_group=config.buffer.samples_per_group, attempts=config.reward.attempts)
        self.log = open_log(config, resume=resume)
        starts = sum(event.kind == "started" for event in self.log.events())
        self.event("started", "buffer", code_version())
        for reading in self.intake.readings:
            say(f"buffer: read {reading}")
            self.event(READ, "source", str(reading))
        self.log.commit()
        self.ledger = Ledger(pace_of(config), first_fence=starts * FENCES_PER_START)
        self.metrics = MetricsWriter(config.run_dir)
        self._restore()
        self._complete_metrics()

    @property
    def finished(self) -> bool:
        """The last step is committed and every evaluation that is due has been made."""
        return self.ledger.committed >= self.config.steps and self.evaluations.complete(self.ledger.committed)

    def event(self, kind: str, worker: str, detail: str) -> None:
        """Notes in the log that something happened to the run."""
        self.log.add_event(kind, worker, detail, time.time())

    def commit(self) -> None:
        """Makes everything since the last time durable. Raises `LogError` (disk full, say), then nothing of it counts;
        or `RewardsBroken` after it."""
        self.log.commit()
        self.rewards.check()
        self._end_evaluations()

    def close(self) -> None:
        self.metrics.close()
        self.log.close()

    # --- what workers bring ----------------------------------------------------------------------------------------

    def rollout(self, worker: str, rollout: m.Rollout) -> str | None:
        """A finished response."""
        refused = self.ledger.rollout(worker, rollout.group, rollout.sample, rollout.fence, rollout.tokens.shape[0])
        if refused is None:
            self.log.add_rollout(worker, rollout, time.time())
            self.texts[rollout.group, rollout.sample] = rollout
            self.partials.pop((rollout.group, rollout.sample), None)
        return refused

    def hand_back(self, worker: str, handed: m.HandBack) -> str | None:
        """Unfinished samples of a leaving generator; another one continues them from their tokens."""
        refused = self.ledger.hand_back(worker, handed.group, handed.fence, handed.samples)
        if refused is None:
            self.partials.update({(handed.group, partial.sample): partial for partial in handed.partials})
            self.event("handed back", worker, handed_back(handed))
        return refused

    def grade(self, worker: str, grade: m.Grade) -> str | None:
        """A verdict on one attempt."""
        refused = self.ledger.grade(worker, grade.group, grade.sample, grade.attempt, grade.verdict, grade.correct)
        if refused is None:
            self.log.add_grade(worker, grade, time.time())
            if problem := self.rewards.saw(grade):
                say(f"buffer: {problem}")
        return refused

    def step(self, commit: m.StepCommit) -> str | None:
        """A trained step. One that the log has already must have come to the same weights."""
        if commit.step <= self.ledger.committed:
            known = self.log.step(commit.step)
            if known is not None and known.weights_hash != commit.weights_hash:
                detail = f"step {commit.step}: re-trained to {commit.weights_hash}, the log has {known.weights_hash}"
                self.event("diverged", "learner", detail)
                return detail
            return None
        try:
            self.ledger.commit(commit.step)
        except ValueError as error:
            return str(error)
        self.latest = {**self.ledger.figures(), **commit.metrics}
        self.log.commit_step(msgspec.structs.replace(commit, metrics=self.latest))
        self.log.commit()
        self.metrics.step(commit.step, self.latest)
        return None

    def batch(self, pull: m.Pull) -> m.Batch | str:
        """The groups that a learner rank asks for, or why it cannot have them."""
        planned = set(self.ledger.planned.get(pull.step) or self.log.plan(pull.step) or ())
        if strangers := [group for group in pull.groups if group not in planned]:
            return f"pull: groups {strangers[:5]} are not in the plan of step {pull.step}"
        return self.log.batch(pull.step, pull.groups)

    # --- what follows ----------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Draws prompts while the pacing rule has room and somebody could start on them, and what is to be evaluated."""
        self._begin_evaluations()
        room = self.ledger.room()
        appetite = self.ledger.appetite() if self.intake.kind == "train" else room
        while room > 0 and appetite > 0:
            entry = self.intake.train(self.next_group, min_version=self.ledger.min_version())
            self._enter(entry.row)
            for rollout in entry.rollouts:
                self.log.add_rollout(entry.origin, rollout, entry.row.issued_at)
            for grade in entry.grades:
                self.log.add_grade(entry.origin, grade, entry.row.issued_at)
            room, appetite = room - 1, appetite - entry.row.samples
        for problem in self.intake.skipped:
            self.event("skipped", "source", problem)
        self.intake.skipped.clear()

    def _enter(self, row: GroupRow) -> None:
        self.next_group = row.group + 1
        self.rows[row.group] = row
        self.log.add_group(row)
        self.ledger.add_group(row.group, row.kind, row.samples, min_version=row.min_version)

    def ticket(self, issue: Issue) -> m.Ticket:
        """What a generator is sent."""
        row, generator = self.rows[issue.group], self.config.generator
        if generator is None:
            raise ConfigError(f"{self.config.source}: a generator joined, but the config has no [generator]")
        sampling = generator.sampling
        if row.kind == "eval":
            evaluation = self.config.eval
            sampling = msgspec.structs.replace(
                sampling, temperature=evaluation.temperature, top_p=evaluation.top_p, top_k=0
            )
        return m.Ticket(
            group=issue.group,
            samples=issue.samples,
            fence=issue.fence,
            prompt=row.prompt,
            sampling=sampling,
            seed=row.seed,
            min_version=issue.min_version,
            resume=[self.partials[issue.group, s] for s in issue.samples if (issue.group, s) in self.partials],
        )

    def grade_task(self, score: Score) -> m.GradeTask:
        """What a reward worker is sent."""
        row, rollout = self.rows[score.group], self.texts[score.group, score.sample]
        return m.GradeTask(
            group=score.group,
            sample=score.sample,
            attempt=score.attempt,
            task=row.task,
            prompt_text=row.prompt_text,
            text=rollout.text,
            answer=row.answer,
            response_tokens=rollout.tokens.shape[0],
            finish=rollout.finish,
        )

    def decided(self, decided: Decided) -> None:
        """A group has all its grades."""
        row = self.rows.pop(decided.group)
        for sample in range(row.samples):
            self.texts.pop((decided.group, sample), None)
        if decided.outcome == "evaluated":
            self.log.set_group(decided.group, "evaluated")
            self.evaluations.graded(row.min_version, decided.group)
        elif decided.outcome != "ready":
            self.log.set_group(decided.group, decided.outcome, reason=decided.reason)
        rounds = self.ledger.fruitless // self.config.buffer.groups_per_step
        if rounds >= SAY_FRUITLESS + self.said_fruitless:
            self.said_fruitless = rounds
            say(f"buffer: {self.ledger.fruitless} groups in a row were all right or all wrong; sampling goes on")
        elif rounds == 0:
            self.said_fruitless = 0

    def plan(self, step: int) -> m.Plan | None:
        """The groups of a step, from the log when it was trained before; None while they are not ready."""
        known = self.log.step(step) if step <= self.ledger.committed else None
        if known is not None:
            groups: list[int] | None = self.log.plan(step)
        else:
            new = step not in self.ledger.planned
            groups = self.ledger.plan(step) if step == self.ledger.committed + 1 else None
            if groups is not None and new:
                self.log.add_plan(step, groups)
                for group in groups:
                    self.rows.pop(group, None)
        if groups is None:
            return None
        return m.Plan(
            step=step,
            groups=self.log.sizes(groups),
            weights_hash=known.weights_hash if known else None,
            last=step == self.config.steps,
            metrics=self.ledger.figures(),
        )

    # --- evaluation: held-out prompts as groups of their own kind, which no pacing counts and nothing waits for ------

    def _begin_evaluations(self) -> None:
        for step in self.evaluations.due(self.ledger.committed):
            rows = list(self.intake.evaluation(self.next_group, step=step))
            self.evaluations.begin(step, [row.group for row in rows])
            for row in rows:
                self._enter(row)

    def _end_evaluations(self) -> None:
        for step in self.evaluations.take_graded():
            figures = self.log.evaluation(step)
            if figures is not None:
                self.evaluations.figures.append({"eval_step": step, **figures})
                self.metrics.evaluation(step, figures)

    # --- start -----------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Rebuilds the ledger from the log: the same groups, with the results that were committed."""
        self.next_group, self.intake.cursor = self.log.next_group(), self.log.next_source_index(self.intake.kind)
        self.ledger.committed = self.log.last_step()
        self.evaluations.figures = self.log.evaluations()
        for step, groups in self.log.planned():
            self.ledger.restore_plan(step, groups)
        for state in self.log.unfinished():
            row = state.row
            self.rows[row.group] = row
            self.ledger.add_group(row.group, row.kind, row.samples, min_version=row.min_version)
            if row.kind == "eval":
                self.evaluations.begin(row.min_version, [row.group])
            if row.kind == "ready":
                continue  # it entered with its response and grade
            self.texts.update({(row.group, rollout.sample): rollout for rollout in self.log.rollouts(row.group)})
            for sample in state.samples:
                self.ledger.restore_rollout(row.group, sample.sample, sample.response_tokens)
                for attempt, verdict, correct in sample.attempts:
                    self.ledger.restore_grade(row.group, sample.sample, attempt, verdict, correct)

    def _complete_metrics(self) -> None:
        """Lines that an earlier process did not come to write: a step and an evaluation count once the log has them, and
        the figures follow after that."""
        for step in self.metrics.missing("step", range(1, self.ledger.committed + 1)):
            row = self.log.step(step)
            if row is not None:
                self.metrics.step(step, row.metrics, at=row.committed_at)
        figures = {int(evaluation["eval_step"]): evaluation for evaluation in self.evaluations.figures}
        for step in self.metrics.missing("eval_step", figures):
            self.metrics.evaluation(step, {name: v for name, v in figures[step].items() if name != "eval_step"})


def handed_back(handed: m.HandBack) -> str:
    """`group 17: samples 0, 3 with 12 (2*5,3*7), 0 tokens`: each sample's tokens, with the runs of (version*tokens)."""
    made = {partial.sample: partial for partial in handed.partials}
    each = []
    for sample in handed.samples:
        partial = made.get(sample)
        runs = ",".join(f"{version}*{count}" for version, count in partial.versions) if partial else ""
        each.append(f"{len(partial.tokens)} ({runs})" if partial else "0")
    return f"group {handed.group}: samples {', '.join(map(str, handed.samples))} with {', '.join(each)} tokens"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
