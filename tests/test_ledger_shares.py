"""Generators of different speed share the work by credit, and the slow one does not hold the steps back: in virtual time."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest

from protocols.ledger import Issue, Ledger, Pace, Score

SIZE, SLOTS = 4, 16
UNTIL_S = 240.0


def shared(seconds: dict[str, float], *, max_lag: int = 3) -> tuple[Counter[str], float]:
    """Responses by generator and steps a second, where each generator takes its `seconds` for any response, in `SLOTS`
    places at a time; grades and training take no time."""
    ledger = Ledger(Pace(steps=10**6, groups_per_step=8, max_lag=max_lag, lease_s=1e9, grade_lease_s=1e9))
    for name in seconds:
        ledger.joined(name, "generator", SLOTS)
        ledger.alive(name, [], 0.0, version=0)
    ledger.joined("reward", "reward", 10**6)
    made: Counter[str] = Counter()
    under_way: list[tuple[float, str, int, int, int]] = []
    now, groups = 0.0, 0
    while now < UNTIL_S:
        moved = True
        while moved:
            moved = False
            while ledger.room() and ledger.appetite():
                ledger.add_group(groups, "train", SIZE, min_version=ledger.min_version())
                groups += 1
            for decision in ledger.decide(now):
                moved = True
                if isinstance(decision, Issue):
                    for sample in decision.samples:
                        due = now + seconds[decision.worker]
                        heapq.heappush(under_way, (due, decision.worker, decision.group, sample, decision.fence))
                elif isinstance(decision, Score):
                    right = (decision.group + decision.sample) % 2 == 0
                    ledger.grade("reward", decision.group, decision.sample, decision.attempt, "graded", right)
            if ledger.plan(ledger.committed + 1) is not None:
                ledger.commit(ledger.committed + 1)
                moved = True
        now, name, group, sample, fence = heapq.heappop(under_way)
        assert ledger.rollout(name, group, sample, fence, 5) is None
        made[name] += 1
    return made, ledger.committed / now


@pytest.mark.parametrize("slower", [2.0, 4.0, 8.0])
def test_a_slower_generator_gets_its_share_and_no_more(slower: float) -> None:
    made, _ = shared({"fast-0": 1.0, "fast-1": 1.0, "slow": slower})
    assert made["slow"] / made["fast-0"] == pytest.approx(1 / slower, rel=0.1)
    assert made["fast-0"] == pytest.approx(made["fast-1"], rel=0.05)


@pytest.mark.parametrize("max_lag", [1, 3])
def test_a_slow_generator_beside_fast_ones_does_not_hold_the_steps_back(max_lag: int) -> None:
    _, without = shared({"fast-0": 1.0, "fast-1": 1.0}, max_lag=max_lag)
    _, beside = shared({"fast-0": 1.0, "fast-1": 1.0, "slow": 4.0}, max_lag=max_lag)
    assert beside >= without


def test_four_generators_do_four_times_the_work_of_one() -> None:
    _, one = shared({"g0": 1.0})
    _, four = shared({f"g{i}": 1.0 for i in range(4)})
    assert four / one >= 3.6
