"""The simulation against closed formulas where they hold, and what must hold in every simulated run."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ledger import Pace
from workers.plan.costs import Costs, GeneratorCost, Group, LearnerCost, Lognormal, Recorded, RewardCost, Work
from workers.plan.figures import Forecast, forecast, steady
from workers.plan.notes import Evaluations, Setting, Simulated
from workers.plan.simulation import Simulation

STEPS = 24


def simulate(
    costs: Costs, work: Work, *, groups: int = 4, samples: int = 4, lag: int = 1, steps: int = STEPS
) -> Simulated:
    pace = Pace(steps=steps, groups_per_step=groups, max_lag=lag)
    return Simulation(Setting(pace, samples), costs, work).run()


def figures(run: Simulated, lag: int, sync_seconds: float = 0.0) -> Forecast:
    first, last = steady(len(run.steps), lag)
    return forecast(run, first=first, last=last, sync_seconds=sync_seconds)


def costs_of(*, slots: int = 16, count: int = 1, pass_seconds: float = 0.01, train: float, sync: float = 0.0) -> Costs:
    """Generators whose pass takes a fixed time, a learner that takes `train` seconds a step, everything else at once."""
    generators = [GeneratorCost(slots, [(1, pass_seconds)])] * count
    learner = LearnerCost(token_seconds=0.0, fixed_seconds=train)
    return Costs(generators, learner, RewardCost(scorers=64, tasks_per_scorer=64), sync_seconds=sync)


def alike(length: int) -> Work:
    """Groups of four responses of one length, half of them right."""
    return Recorded([Group(8, [length] * 4, [True, False, True, False])])


# --- closed formulas of asynchronous post-training ---------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(length=st.integers(5, 400), train=st.floats(0.05, 5.0), sync=st.floats(0.0, 1.0))
def test_taking_turns_a_step_takes_generating_training_and_the_new_weights(
    length: int, train: float, sync: float
) -> None:
    """T_s = t_g + t_t + t_w: at lag 0 nothing overlaps."""
    found = figures(simulate(costs_of(train=train, sync=sync), alike(length), lag=0), 0).figures
    generate = 0.01 * length
    assert found.step_seconds == pytest.approx(generate + train + sync, rel=1e-6)
    assert found.learner_idle == pytest.approx((generate + sync) / found.step_seconds, rel=1e-6)
    assert found.generator_idle == pytest.approx((train + sync) / found.step_seconds, abs=1e-6)
    assert found.lag_max == 0


@settings(max_examples=25, deadline=None)
@given(length=st.integers(20, 400), train=st.floats(0.05, 5.0), lag=st.integers(2, 4))
def test_with_enough_lag_a_step_takes_the_longer_of_both(length: int, train: float, lag: int) -> None:
    """T_a = max(t_g, t_t) where lengths are equal, so that there is no tail."""
    found = figures(simulate(costs_of(train=train), alike(length), lag=lag), lag).figures
    generate = 0.01 * length
    assert found.step_seconds == pytest.approx(max(generate, train), rel=0.02)
    assert found.learner_idle == pytest.approx(max(0.0, generate - train) / found.step_seconds, abs=0.02)


@settings(max_examples=15, deadline=None)
@given(tail=st.integers(2, 40))
def test_taking_turns_a_step_waits_for_the_longest_response(tail: int) -> None:
    """S_tail = E[max of k lengths] / E[length]: three short responses and a long one, every group alike."""
    work = Recorded([Group(8, [10, 10, 10, 10 * tail], [True, False, True, False])])
    found = figures(simulate(costs_of(train=0.5), work, lag=0), 0)
    assert found.figures.step_seconds == pytest.approx(0.1 * tail + 0.5, rel=1e-6)
    mean = (3 * 10 + 10 * tail) / 4
    factor = 0.01 * 10 * tail / (0.01 * mean)
    filled = 0.01 * mean / found.figures.step_seconds
    assert found.slots_filled == pytest.approx(filled, rel=1e-6)
    assert found.figures.step_seconds - 0.5 == pytest.approx(factor * 0.01 * mean, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(seconds=st.floats(0.02, 0.2), lag=st.integers(1, 4), sigma=st.floats(0.0, 1.0))
def test_sequences_under_way_are_those_of_littles_law(seconds: float, lag: int, sigma: float) -> None:
    """C = rate x latency. Generators with room for everything and a learner that takes no time: what limits the run is the
    bound of the lag, so the system is always full, (L + 1) B groups, and of those all that wait for a sample are live."""
    run = simulate(costs_of(slots=400, pass_seconds=seconds, train=1e-3), Lognormal(50, 400, sigma), lag=lag, steps=80)
    found = figures(run, lag)
    assert run.most_in_system == (lag + 1) * 4
    assert found.slots_filled * 400 == pytest.approx(found.figures.tokens_per_second * seconds, rel=0.08)
    assert found.figures.lag_mean <= lag


@pytest.mark.parametrize("count", [1, 2, 4])
def test_generators_share_the_work(count: int) -> None:
    """Generation-bound: t_g(n) = t_g(1) / n where slots are always full and there is no tail."""
    run = simulate(costs_of(slots=16, count=count, train=1e-3), alike(100), groups=16, lag=4, steps=40)
    found = figures(run, 4)
    assert found.figures.step_seconds == pytest.approx(4.0 / count, rel=0.05)
    assert found.figures.tokens_per_second == pytest.approx(1600 * count, rel=0.05)


def test_a_pass_takes_longer_with_more_sequences() -> None:
    cost = GeneratorCost(8, [(1, 0.1), (5, 0.3)])
    assert cost.pass_seconds().tolist() == pytest.approx([0.1, 0.1, 0.15, 0.2, 0.25, 0.3, 0.3, 0.3, 0.3])
    run = simulate(Costs([GeneratorCost(16, [(1, 0.01), (16, 0.16)])], LearnerCost(0.0, 1.0)), alike(10), lag=0)
    assert figures(run, 0).figures.step_seconds == pytest.approx(1.6 + 1.0, rel=1e-6)


def test_prompts_and_new_weights_make_decoding_stand_still() -> None:
    generator = GeneratorCost(16, [(1, 0.01)], prefill_token_seconds=0.002, adopt_seconds=0.25)
    run = simulate(Costs([generator], LearnerCost(0.0, 1.0)), alike(100), lag=0)
    assert figures(run, 0).figures.step_seconds == pytest.approx(1.0 + 1.0 + 0.25 + 4 * 8 * 0.002, rel=1e-6)


def test_grading_that_is_too_slow_holds_the_run_up() -> None:
    reward = RewardCost(workers=2, scorers=1, tasks_per_scorer=64, score_seconds=0.5)
    learner = LearnerCost(0.0, 0.1)
    run = simulate(Costs([GeneratorCost(64, [(1, 1e-3)])], learner, reward), alike(10), lag=2, steps=40)
    assert figures(run, 2).figures.step_seconds == pytest.approx(16 * 0.5 / 2, rel=0.02)


# --- what holds in every run ---------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    lag=st.integers(0, 3),
    groups=st.integers(1, 6),
    samples=st.integers(2, 5),
    keep=st.sampled_from([0.3, 0.7, 1.0]),
    count=st.integers(1, 3),
    train=st.floats(0.0, 3.0),
    sync=st.floats(0.0, 3.0),
    turn=st.sampled_from([0.0, 0.05]),
)
def test_every_group_is_trained_once_and_the_bounds_hold(
    lag: int, groups: int, samples: int, keep: float, count: int, train: float, sync: float, turn: float
) -> None:
    costs = Costs(
        [GeneratorCost(8, [(1, 0.01), (8, 0.02)], prefill_token_seconds=1e-4)] * count,
        LearnerCost(1e-5, train, unevenness=(0.5, 1.5)),
        RewardCost(1, 2, 4, 0.01, 0.01),
        sync_seconds=sync,
        send_seconds=0.01,
        turn_seconds=turn,
    )
    run = simulate(costs, Lognormal(30, 200, keep=keep, prompt=10), groups=groups, samples=samples, lag=lag, steps=12)
    trained = [group for step in run.steps for group in step.groups]
    assert len(trained) == len(set(trained)) == 12 * groups
    assert run.kept >= len(trained)
    bound = (lag + 1) * groups
    assert run.most_in_system <= 3 * bound
    if lag == 0:
        assert run.most_in_system <= bound
        assert {key for step in run.steps for key in step.lags} == {0}
    for before, after in zip(run.steps, run.steps[1:], strict=False):
        assert before.started <= before.finished <= before.committed <= after.started
        assert after.waited >= 0
    for step in run.steps:
        made = sum(step.lags.values())
        assert made == pytest.approx(step.tokens - 10 * groups, rel=1e-6)
        assert min(step.lags) >= 0


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    setting = Setting(Pace(steps=8, groups_per_step=4, max_lag=1), 4, Evaluations(prompts=3, samples=2, every=4))
    work, costs = Lognormal(30, 200, keep=0.5), costs_of(train=0.3, count=2)
    runs = [Simulation(setting, costs, work, seed=seed).run() for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_an_evaluation_takes_its_time_of_the_generators() -> None:
    pace = Pace(steps=STEPS, groups_per_step=4, max_lag=0)
    seconds = []
    for every in (0, 1):
        setting = Setting(pace, 4, Evaluations(prompts=32 if every else 0, samples=1, every=every))
        run = Simulation(setting, costs_of(train=0.5), alike(100)).run()
        seconds.append(figures(run, 0).figures.step_seconds)
    # 16 slots and 32 responses of one second each: the groups of training wait for a part of them.
    assert seconds[1] > seconds[0] + 0.5


def test_hundreds_of_generators_take_seconds() -> None:
    costs = Costs(
        [GeneratorCost(32, [(1, 0.01), (32, 0.015)])] * 256, LearnerCost(0.0, 5.0), RewardCost(8, 8, 64, 1e-3),
        sync_seconds=1.0, turn_seconds=0.05,
    )  # fmt: skip
    began = time.process_time()
    run = simulate(costs, Lognormal(300, 2000), groups=256, samples=16, lag=1, steps=8)
    assert time.process_time() - began < 15
    assert math.isfinite(figures(run, 1).figures.step_seconds)
