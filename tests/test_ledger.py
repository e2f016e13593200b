"""Histories of the ledger: whatever workers do, the pacing bound holds, nothing counts twice, and work goes on."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ledger import Decided, Issue, Ledger, Pace, Score

ACTIONS = [
    "generate",
    "generate",
    "reward",
    "reward",
    "reward",
    "learn",
    "leave",
    "join",
    "join",
    "load",
    "load",
    "stall",
    "repeat",
]
PACE = Pace(
    steps=4, groups_per_step=3, max_lag=1, max_oversample=2.0, lease_s=10.0, grade_lease_s=10.0, grade_attempts=2
)


class World:
    """Generators, rewards and a learner that act in a random order, crash, stall and repeat themselves."""

    def __init__(self, pace: Pace, size: int, seed: int, right: float) -> None:
        self.ledger, self.random, self.size, self.right = Ledger(pace), random.Random(seed), size, right
        self.now, self.next_group = 0.0, 0
        self.leased: list[Issue] = []
        self.scoring: list[Score] = []
        self.outcomes: dict[int, str] = {}
        self.counted: Counter[tuple[int, int]] = Counter()
        self.trained: list[int] = []
        self.late: list[tuple[str, int, int, int]] = []
        self.loaded: dict[str, int] = {}
        """The version that each generator has said it serves."""

    def turn(self) -> None:
        """Admit what may enter, decide, and check what must hold at every moment."""
        ledger = self.ledger
        while ledger.room() and ledger.appetite():
            assert ledger.min_version() <= ledger.committed, "it would wait for weights that nobody will make"
            ledger.add_group(self.next_group, "train", self.size, min_version=ledger.min_version())
            self.next_group += 1
        for decision in ledger.decide(self.now):
            if isinstance(decision, Issue):
                assert decision.samples
                assert decision.worker in self.loaded, "a ticket went to a generator without weights"
                self.leased.append(decision)
            elif isinstance(decision, Score):
                self.scoring.append(decision)
            else:
                assert decision.group not in self.outcomes, "a group was decided twice"
                self.outcomes[decision.group] = decision.outcome
        bound = (ledger.pace.max_lag + 1) * ledger.pace.groups_per_step
        assert ledger.in_system <= ledger.pace.max_oversample * bound
        if ledger.pace.max_lag == 0 or not ledger.pace.dynamic_sampling:
            assert ledger.in_system <= bound

    def generate(self) -> None:
        if not self.leased:
            return
        issue = self.leased.pop(self.random.randrange(len(self.leased)))
        for sample in issue.samples:
            if self.ledger.rollout(issue.worker, issue.group, sample, issue.fence, 5) is None:
                self.counted[issue.group, sample] += 1
            self.late.append((issue.worker, issue.group, sample, issue.fence))

    def repeat(self) -> None:
        """Something that was sent before arrives again: it must be refused."""
        if self.late:
            worker, group, sample, fence = self.random.choice(self.late)
            assert self.ledger.rollout(worker, group, sample, fence, 5) is not None

    def reward(self, verdicts: tuple[str, ...] = ("graded",) * 6 + ("timeout", "crash", "infra")) -> None:
        if self.scoring:
            s = self.scoring.pop(self.random.randrange(len(self.scoring)))
            self.ledger.grade(
                s.worker, s.group, s.sample, s.attempt, self.random.choice(verdicts), self.random.random() < self.right
            )

    def learn(self) -> None:
        step = self.ledger.committed + 1
        if step <= self.ledger.pace.steps and self.ledger.plan(step) is not None and self.random.random() < 0.7:
            self.trained += self.ledger.commit(step)
            assert self.ledger.commit(step) == []

    def leave(self) -> None:
        name = self.random.choice(sorted(self.ledger.workers) or ["g0"])
        self.ledger.left(name)
        self.loaded.pop(name, None)
        # The zombie's tickets stay in `leased`: its late results are tried and must be refused.

    def join(self) -> None:
        role = self.random.choice(["generator", "reward"])
        name = f"{role[0]}{self.random.randrange(3)}"
        self.ledger.joined(name, role, self.random.randint(1, 8))
        self.loaded.pop(name, None)  # it comes (back) as a process that has none yet

    def load(self) -> None:
        """A generator gets its first weights, or newer ones."""
        if generators := sorted(name for name in self.ledger.workers if name.startswith("g")):
            name = self.random.choice(generators)
            self.loaded[name] = self.ledger.committed
            self.hear(name)

    def hear(self, name: str, *, holds: bool = True) -> None:
        """A heartbeat of this worker comes."""
        held = [(i.group, i.fence) for i in self.leased if i.worker == name] if holds else []
        self.ledger.alive(name, held, self.now, version=self.loaded.get(name))

    def stall(self) -> None:
        self.now += self.random.choice([1.0, 11.0])
        for name in sorted(self.ledger.workers):
            if self.random.random() < 0.8:
                self.hear(name)

    def finish(self) -> None:
        """Only healthy workers from now on: the run must reach its last step."""
        self.ledger.joined("g-last", "generator", 2 * self.size)
        self.ledger.joined("r-last", "reward", 4)
        for _ in range(20_000):
            self.turn()
            if self.ledger.committed == self.ledger.pace.steps:
                return
            for name in self.ledger.workers:
                if name.startswith("g"):
                    self.loaded.setdefault(name, self.ledger.committed)
                self.hear(name, holds=False)
            self.now += 0.5
            self.generate()
            self.reward(("graded",))
            self.learn()
        pytest.fail(f"stuck: {self.ledger.figures()}")


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    actions=st.lists(st.sampled_from(ACTIONS), max_size=120),
    lag=st.integers(0, 3),
    size=st.integers(2, 5),
    dynamic=st.booleans(),
    right=st.sampled_from([0.05, 0.5, 0.9]),
)
def test_any_history_keeps_the_bound_counts_once_and_ends(
    seed: int, actions: list[str], lag: int, size: int, dynamic: bool, right: float
) -> None:
    pace = Pace(
        steps=4,
        groups_per_step=3,
        max_lag=lag,
        dynamic_sampling=dynamic,
        max_oversample=2.0,
        lease_s=10.0,
        grade_lease_s=10.0,
        grade_attempts=2,
    )
    world = World(pace, size, seed, right)
    world.join()
    world.load()
    for action in actions:
        getattr(world, action)()
        world.turn()
    world.finish()
    assert max(world.counted.values()) == 1, "a sample counted twice"
    assert len(world.trained) == len(set(world.trained)) == pace.steps * pace.groups_per_step
    assert all(world.outcomes[group] == "ready" for group in world.trained)


def serving(ledger: Ledger, name: str, capacity: int) -> None:
    """A generator joins that has its weights."""
    ledger.joined(name, "generator", capacity)
    ledger.alive(name, [], 0.0, version=0)


def running(pace: Pace = PACE, size: int = 2) -> Ledger:
    ledger = Ledger(pace)
    serving(ledger, "g", 100)
    ledger.joined("r", "reward", 100)
    while ledger.room():
        ledger.add_group(len(ledger.groups), "train", size)
    ledger.decide(0.0)
    return ledger


def decide_group(ledger: Ledger, group: int, right: list[bool]) -> list[Decided]:
    for index in range(len(right)):
        assert ledger.rollout("g", group, index, 1, 5) is None
    ledger.decide(0.0)
    for index, correct in enumerate(right):
        assert ledger.grade("r", group, index, 0, "graded", correct) is None
    return [d for d in ledger.decide(0.0) if isinstance(d, Decided)]


def test_dropped_groups_free_their_place_at_once() -> None:
    ledger = running()
    assert ledger.room() == 0
    assert ledger.in_system == 6
    assert decide_group(ledger, 0, [True, True]) == [Decided(0, "train", "dropped", "all correct")]
    assert decide_group(ledger, 1, [False, False]) == [Decided(1, "train", "dropped", "all wrong")]
    assert ledger.in_system == 4
    assert ledger.room() >= 2
    assert ledger.figures()["total_dropped_tokens"] == 20


def test_oversampling_follows_the_measured_keep_rate() -> None:
    ledger = running(Pace(steps=100, groups_per_step=3, max_lag=1, max_oversample=4.0))
    for group in range(6):
        decide_group(ledger, group, [True, group != 0])
    assert ledger.keep < 0.7
    assert 1 / ledger.keep * 5 - 1 < ledger.room() <= 1 / ledger.keep * 6


def test_a_group_is_sampled_by_weights_that_its_turn_allows() -> None:
    """One step of lag: while step 1 trains, what enters for step 2 may be sampled by version 0; after its commit, what
    enters for step 3 (trained on version 2) must be sampled by version 1."""
    ledger = running()
    for group in range(6):
        decide_group(ledger, group, [True, False])
    ledger.plan(1)
    assert ledger.room() == 0
    ledger.commit(1)
    assert (ledger.room(), ledger.min_version()) == (3, 1)


def test_zombie_is_refused_by_its_fence() -> None:
    ledger = running()
    ledger.left("g")
    serving(ledger, "h", 100)
    issued = [d for d in ledger.decide(1.0) if isinstance(d, Issue)]
    assert {i.fence for i in issued} == {2}
    assert "fence 1 is not the current one" in str(ledger.rollout("g", 0, 0, 1, 5))
    assert ledger.rollout("h", 0, 0, 2, 5) is None
    assert ledger.rollout("h", 0, 0, 2, 5) is not None


def test_a_stalled_generator_loses_its_lease_and_gets_no_more_until_it_speaks() -> None:
    ledger = running()
    ledger.alive("g", [(0, 1)], 9.0, version=0)
    ledger.decide(12.0)
    assert ledger.groups[0].samples[0].stage == "leased"
    assert ledger.groups[1].samples[0].stage == "new"
    ledger.alive("g", [(0, 1)], 12.0, version=0)
    assert len([d for d in ledger.decide(12.0) if isinstance(d, Issue)]) == 5


def issues(ledger: Ledger, now: float) -> list[tuple[str, int]]:
    return [(d.worker, d.group) for d in ledger.decide(now) if isinstance(d, Issue)]


def test_a_joiner_holds_nothing_back_until_it_serves() -> None:
    """Not even prompts: its places count for nothing before it has said which weights it serves, by any heartbeat."""
    ledger = Ledger(PACE)
    ledger.joined("joiner", "generator", 8)
    assert ledger.appetite() == 0
    ledger.add_group(0, "train", 2)
    ledger.alive("joiner", [], 1.0)
    assert issues(ledger, 1.0) == []
    serving(ledger, "other", 2)
    assert issues(ledger, 2.0) == [("other", 0)]
    ledger.add_group(1, "train", 2)
    assert issues(ledger, 3.0) == []
    ledger.alive("joiner", [], 4.0, version=3)
    assert ledger.appetite() == 6
    assert issues(ledger, 4.0) == [("joiner", 1)]


def test_a_generator_that_comes_back_says_anew_what_it_serves() -> None:
    """It may be a process that was started anew under the name, and has no weights."""
    ledger = Ledger(PACE)
    serving(ledger, "g", 4)
    ledger.joined("g", "generator", 4)
    ledger.add_group(0, "train", 2)
    assert issues(ledger, 1.0) == []
    ledger.alive("g", [], 2.0, version=0)
    assert issues(ledger, 2.0) == [("g", 0)]


def test_failed_samples_are_left_out_and_a_group_of_one_fails() -> None:
    ledger = running()
    for index in range(2):
        ledger.rollout("g", 0, index, 1, 5)
    for attempt in range(2):
        ledger.decide(0.0)
        ledger.grade("r", 0, 0, attempt, "timeout", False)
    ledger.decide(0.0)
    ledger.grade("r", 0, 1, 0, "graded", True)
    (decided,) = [d for d in ledger.decide(0.0) if isinstance(d, Decided)]
    assert (decided.outcome, decided.reason) == ("failed", "1 of 2 samples could not be graded")


def test_groups_stay_together_and_go_to_the_freest_generator() -> None:
    ledger = Ledger(PACE)
    serving(ledger, "slow", 4)
    serving(ledger, "fast", 16)
    for group in range(3):
        ledger.add_group(group, "train", 4)
    issued = [d for d in ledger.decide(0.0) if isinstance(d, Issue)]
    assert [len(i.samples) for i in issued] == [4, 4, 4]
    assert Counter(i.worker for i in issued) == {"fast": 2, "slow": 1}


def test_restored_state_goes_on_where_it_was() -> None:
    ledger = Ledger(PACE)
    ledger.add_group(7, "train", 2)
    ledger.restore_rollout(7, 0, 5)
    ledger.restore_rollout(7, 1, 5)
    ledger.restore_grade(7, 0, 0, "graded", True)
    ledger.joined("r", "reward", 4)
    serving(ledger, "g", 4)
    assert ledger.decide(0.0) == [Score("r", 7, 1, 0)]


@pytest.mark.parametrize("right", [False, True])
def test_a_restored_group_that_needs_no_generator_is_not_waiting_for_one(right: bool) -> None:
    ledger = Ledger(PACE)
    ledger.add_group(7, "train", 2)
    for sample in (0, 1):
        ledger.restore_rollout(7, sample, 5)
        ledger.restore_grade(7, sample, 0, "graded", right and sample == 0)
    serving(ledger, "g", 4)
    assert ledger.appetite() == 4
    assert [type(d) for d in ledger.decide(0.0)] == [Decided]


def test_a_zombie_from_before_a_restart_is_refused() -> None:
    ledger = Ledger(PACE, first_fence=1 << 20)
    ledger.add_group(7, "train", 2)
    serving(ledger, "g", 4)
    (issue,) = [d for d in ledger.decide(0.0) if isinstance(d, Issue)]
    assert issue.fence == (1 << 20) + 1
    assert "fence 1 is not the current one" in str(ledger.rollout("g", 7, 0, 1, 5))


def test_out_of_turn_steps_are_refused_by_name() -> None:
    ledger = running()
    with pytest.raises(ValueError, match="got step 3, expected 1"):
        ledger.plan(3)
    with pytest.raises(ValueError, match="got step 1, expected 1 and that it was planned"):
        ledger.commit(1)
