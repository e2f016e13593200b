"""A run in simulated time, paced by the ledger of real runs.

`protocols.ledger.Ledger` is fed with what a buffer would feed it (who joined, groups that enter, responses, grades, commits)
and decides as there: which group enters when, who gets it, what is dropped, when a step can be planned. This file has only
a clock, the time that workers take for what the ledger gives them, and a note of what happened.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np

from protocols.ledger import Decided, Issue, Ledger, Score
from workers.credit import capacity
from workers.plan.costs import Costs, Group, Work
from workers.plan.generators import Sequence, SimulatedGenerator
from workers.plan.notes import Setting, Simulated, Snapshot, Step

TURNS_LIMIT = 20_000_000
"""A simulation that takes more turns than this does not end; no plan comes near it."""


class Stalled(RuntimeError):
    """Nothing is left to happen and the last step is not trained; says where the ledger stands."""


class Simulation:
    """One run; `run()` once."""

    def __init__(self, setting: Setting, costs: Costs, work: Work, *, seed: int = 0) -> None:
        """The same arguments give the same run."""
        # Workers in this world neither stall nor die, so no lease ends.
        pace = msgspec.structs.replace(setting.pace, lease_s=float("inf"), grade_lease_s=float("inf"))
        self.setting, self.costs, self.work = setting, costs, work
        self.ledger = Ledger(pace)
        self._rng = np.random.default_rng(seed)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._groups: dict[int, Group] = {}
        self._sequences: dict[int, list[Sequence]] = {}
        self._next_group = self._entered = 0
        self._asked_at: float | None = None
        self._sent_until = 0.0
        self._steps: list[Step] = []
        self._most = self._samples = self._tokens = 0
        self._evaluated = -1
        self._generators = {
            f"generator-{i}": SimulatedGenerator(f"generator-{i}", cost) for i, cost in enumerate(costs.generators)
        }
        self._stamps = dict.fromkeys(self._generators, 0)
        self._scorers = {f"reward-{i}": [0.0] * costs.reward.scorers for i in range(costs.reward.workers)}
        for name, generator in self._generators.items():
            self.ledger.joined(name, "generator", capacity(generator.cost.slots))
            self.ledger.alive(name, [], 0.0, version=0)  # every generator has the first weights when the clock starts
        for name in self._scorers:
            self.ledger.joined(name, "reward", costs.reward.scorers * costs.reward.tasks_per_scorer)

    def run(self) -> Simulated:
        """To the commit of the last step. Raises `Stalled`."""
        self._at(0.0, lambda: self._published(0))
        self._at(0.0, self._ask)
        for _ in range(TURNS_LIMIT):
            if self.ledger.committed >= self.setting.pace.steps:
                break
            if not self._events:
                raise Stalled(f"nothing left to happen at {self._now:.3f} s: {self.ledger.figures()}")
            self._turn()
        else:
            raise Stalled(f"not done after {TURNS_LIMIT} turns, at {self._now:.3f} s: {self.ledger.figures()}")
        return Simulated(
            steps=self._steps,
            generators=len(self._generators),
            slots=sum(generator.cost.slots for generator in self._generators.values()),
            kept=self.ledger.totals["kept"],
            dropped=self.ledger.totals["dropped"],
            most_in_system=self._most,
        )

    # --- the buffer ------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """What has come until the end of this turn goes to the ledger; then what follows from it, as in `workers.buffer`."""
        until = self._events[0][0] + self.costs.turn_seconds
        while self._events and self._events[0][0] <= until:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        self._now = max(self._now, until)
        self._admit()
        for decision in self.ledger.decide(self._now):
            match decision:
                case Issue():
                    self._issue(decision)
                case Score():
                    self._score(decision)
                case Decided() if decision.outcome != "ready":
                    self._groups.pop(decision.group)
                    self._sequences.pop(decision.group, None)
        self._most = max(self._most, self.ledger.in_system)
        self._plan()

    def _admit(self) -> None:
        """As `workers.run_state.RunState.admit`."""
        evaluations, committed = self.setting.evaluations, self.ledger.committed
        if committed > self._evaluated and evaluations.due(committed, self.setting.pace.steps):
            self._evaluated = committed
            for _ in range(evaluations.prompts):
                self._enter("eval", self.work.draw(self._rng, evaluations.samples, None), committed)
        room = self.ledger.room()
        appetite = self.ledger.appetite() if room > 0 else 0
        while room > 0 and appetite > 0:
            group = self.work.draw(self._rng, self.setting.samples, self._entered)
            self._entered += 1
            self._enter("train", group, self.ledger.min_version())
            room, appetite = room - 1, appetite - len(group.lengths)

    def _enter(self, kind: str, group: Group, min_version: int) -> None:
        number, self._next_group = self._next_group, self._next_group + 1
        self._groups[number] = group
        self.ledger.add_group(
            number, "eval" if kind == "eval" else "train", len(group.lengths), min_version=min_version
        )

    def _plan(self) -> None:
        """Answers a learner that asks, once its step is ready."""
        if self._asked_at is None or self.ledger.committed >= self.setting.pace.steps:
            return
        groups = self.ledger.plan(self.ledger.committed + 1)
        if groups is not None:
            asked, self._asked_at = self._asked_at, None
            started = self._now + self.costs.learner.pull_seconds
            self._at(started, lambda: self._train(groups, started - asked))

    # --- generators ------------------------------------------------------------------------------------------------

    def _issue(self, issue: Issue) -> None:
        group = self._groups[issue.group]
        sequences = [
            Sequence(
                issue.group,
                sample,
                issue.fence,
                length=group.lengths[sample],
                prompt=group.prompt,
                min_version=issue.min_version,
            )
            for sample in issue.samples
        ]
        self._sequences.setdefault(issue.group, []).extend(sequences)
        generator = self._generators[issue.worker]

        def arrive() -> None:
            self._finish(generator)
            generator.add(sequences)
            self._look_again(generator)

        self._at(self._now + self.costs.send_seconds, arrive)

    def _finish(self, generator: SimulatedGenerator) -> None:
        """Moves a generator on to now; what has ended is on its way to the buffer."""
        generator.advance(self._now)
        for sequence in generator.finished():
            self._at(self._now + self.costs.send_seconds, partial(self._rollout, generator.name, sequence))

    def _look_again(self, generator: SimulatedGenerator) -> None:
        """When its next sequence ends; an earlier reckoning of that counts no longer."""
        due, name = generator.due(), generator.name
        stamp = self._stamps[name] = self._stamps[name] + 1

        def end() -> None:
            if self._stamps[name] == stamp:
                self._finish(generator)
                self._look_again(generator)

        if due is not None:
            self._at(due, end)

    def _rollout(self, worker: str, sequence: Sequence) -> None:
        self._samples += 1
        self._tokens += sequence.length
        self.ledger.rollout(worker, sequence.group, sequence.sample, sequence.fence, sequence.length)

    # --- rewards ---------------------------------------------------------------------------------------------------

    def _score(self, score: Score) -> None:
        free = self._scorers[score.worker]
        first = min(range(len(free)), key=free.__getitem__)
        free[first] = max(free[first], self._now) + self.costs.reward.score_seconds
        correct = self._groups[score.group].correct[score.sample]

        def grade() -> None:
            self.ledger.grade(score.worker, score.group, score.sample, score.attempt, "graded", correct)

        self._at(free[first] + self.costs.reward.delay_seconds, grade)

    # --- the learner -----------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        self._asked_at = self._now

    def _train(self, groups: list[int], waited: float) -> None:
        learner = self.costs.learner
        tokens = sum(self._groups[group].tokens for group in groups)
        factor = learner.unevenness[int(self._rng.integers(len(learner.unevenness)))]
        started, finished = self._now, self._now + factor * (learner.fixed_seconds + learner.token_seconds * tokens)
        totals = self._totals()
        lags = self._lags(len(self._steps), groups)
        for group in groups:
            del self._groups[group], self._sequences[group]

        def commit() -> None:
            self.ledger.commit(len(self._steps) + 1)
            in_system = self.ledger.in_system
            self._steps.append(Step(started, finished, self._now, waited, groups, tokens, lags, in_system, totals))
            self._publish(len(self._steps))

        self._at(finished + learner.commit_seconds, commit)

    def _publish(self, version: int) -> None:
        """The broadcast runs beside the next step; it begins when the one before is over, and the learner waits for that."""
        begins = max(self._now, self._sent_until)
        self._sent_until = begins + self.costs.sync_seconds
        self._at(self._sent_until, lambda: self._published(version))
        self._at(begins + self.costs.learner.publish_seconds, self._ask)

    def _published(self, version: int) -> None:
        for generator in self._generators.values():
            self._finish(generator)
            generator.adopt(version)
            self._look_again(generator)

    def _lags(self, trains: int, groups: list[int]) -> dict[int, float]:
        """Tokens of these groups by how many versions the weights that sampled them are behind `trains`, those trained."""
        lags: Counter[int] = Counter()
        for group in groups:
            for sequence in self._sequences[group]:
                for version, tokens in sequence.versions():
                    lags[trains - version] += tokens  # type: ignore[assignment]  # a part of a token is possible
        return dict(lags)

    def _totals(self) -> Snapshot:
        for generator in self._generators.values():
            self._finish(generator)
            self._look_again(generator)
        generators = self._generators.values()
        return Snapshot(
            busy_seconds=sum(g.busy_seconds for g in generators),
            slot_seconds=sum(g.slot_seconds for g in generators),
            made=sum(g.tokens for g in generators),
            samples=self._samples,
            tokens=self._tokens,
            groups=self._next_group,
        )

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen))
