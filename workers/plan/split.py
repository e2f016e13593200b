"""How to share GPUs between learner and generators: the closed bound says where to look, simulations decide.

The bound is T >= max(t_g, t_t): a step takes at least as long as generating its tokens at full slots, dropped groups
included, and as training them. Tails, lag, new weights and waits are what the simulation adds.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from engine.config import Config, ConfigError
from workers.plan.check import setting_of
from workers.plan.costs import Costs, Work
from workers.plan.figures import Forecast, forecast, steady
from workers.plan.notes import Setting
from workers.plan.simulation import Simulation

AROUND = (0.35, 0.55, 0.75, 0.9, 1.0, 1.15, 1.4)
"""Splits that are simulated: the learner's GPUs as parts of what the bound says, for tails and waits shift the balance."""
TURNS_A_STEP = 300
"""Events of a simulated step that come within its 300th part are one turn, so that large plans take seconds."""
STEADY_STEPS = 6
"""Simulated beside those that the run's start and end touch, where nobody says how many."""
ALIKE = 0.01
"""Of step times that differ by less, the split with fewer GPUs for the learner wins."""


class Option(Struct, frozen=True):
    """One split: GPUs of the learner, generators and the GPUs of each, both sides of the bound, and what was simulated."""

    learner: int
    generators: int
    gpus_each: int
    generate_seconds: float
    train_seconds: float
    forecast: Forecast

    @property
    def step_seconds(self) -> float:
        return self.forecast.figures.step_seconds


def bound(costs: Costs, setting: Setting, work: Work) -> tuple[float, float]:
    """(t_g, t_t) in seconds: generating a step's tokens with all slots live, and training them."""
    pace = setting.pace
    groups = pace.groups_per_step / (work.keep if pace.dynamic_sampling else 1.0)
    rate = sum(g.slots / float(g.pass_seconds()[-1]) for g in costs.generators)
    prefill = min(g.prefill_token_seconds for g in costs.generators) * groups * work.prompt / len(costs.generators)
    generate = groups * setting.samples * work.response / rate + prefill
    trained = pace.groups_per_step * (work.prompt + setting.samples * work.response)
    return generate, costs.learner.fixed_seconds + costs.learner.token_seconds * trained


def simulate(costs: Costs, setting: Setting, work: Work, *, seed: int) -> Forecast:
    """The steady steps of a run of these costs."""
    scale = max(bound(costs, setting, work))
    if setting.pace.max_lag == 0:  # then nothing hides the longest response
        scale = max(scale, work.longest * float(min(g.pass_seconds()[1] for g in costs.generators)))
    turn = scale / TURNS_A_STEP
    costs = msgspec.structs.replace(costs, turn_seconds=max(costs.turn_seconds, turn))
    run = Simulation(setting, costs, work, seed=seed).run()
    first, last = steady(setting.pace.steps, setting.pace.max_lag)
    return forecast(run, first=first, last=last, sync_seconds=costs.sync_seconds)


def options(
    costs_of: Callable[[int], Costs], learners: list[int], setting: Setting, work: Work, *, seed: int
) -> list[Option]:
    """Splits around the one whose bound is least, simulated, the best first. Raises `ConfigError` where there is none."""
    if not learners:
        raise ConfigError("--gpus: too few for a learner and one generator of this model")
    bounds = {learner: bound(costs_of(learner), setting, work) for learner in learners}
    found = []
    for learner in _around(min(learners, key=lambda learner: (max(bounds[learner]), learner)), learners):
        costs = costs_of(learner)
        made = simulate(costs, setting, work, seed=seed)
        found.append(Option(learner, len(costs.generators), costs.generators[0].gpus, *bounds[learner], made))
    least = min(option.step_seconds for option in found)
    best = min((o for o in found if o.step_seconds <= least * (1 + ALIKE)), key=lambda o: o.learner)
    return [best, *sorted((o for o in found if o is not best), key=lambda o: o.step_seconds)]


def _around(balanced: int, learners: list[int]) -> list[int]:
    """Those to simulate: all of a few, else the nearest to parts of the balanced one."""
    if len(learners) <= len(AROUND):
        return learners
    return sorted({min((abs(n - part * balanced), n) for n in learners)[1] for part in AROUND})


def reason(best: Option, others: list[Option]) -> str:
    """Why this split, in one line."""
    figures = best.forecast.figures
    side = "generators" if figures.learner_idle > figures.generator_idle else "the learner"
    text = (
        f"learner {best.learner} GPUs, {best.generators} generators of {best.gpus_each}: {best.step_seconds:.3g} s a step; alone, "
        f"generating takes {best.generate_seconds:.3g} s and training {best.train_seconds:.3g} s, the longer wait is for {side}"
    )
    if others:
        text += f"; the next best, {others[0].learner} GPUs for the learner, takes {others[0].step_seconds:.3g} s"
    return text


def planned(config: Config, steps: int | None) -> Setting:
    """The setting of a config, of `steps` steps in all and without evaluations. Raises ValueError for too few."""
    setting = setting_of(config)
    steps = STEADY_STEPS + 2 * setting.pace.max_lag + 4 if steps is None else steps
    steady(steps, setting.pace.max_lag)
    return Setting(msgspec.structs.replace(setting.pace, steps=steps), setting.samples)
