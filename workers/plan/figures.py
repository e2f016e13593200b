"""What a run comes to, the same figures of a simulated one and of a recorded one.

All are of a stretch of steps: from the start of the training of its first step to the start of that of the step after its
last one, so that a stretch of n steps has n whole cycles of waiting, pulling, training, committing and publishing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from msgspec import Struct

from workers.plan.notes import Simulated

TOKEN_BYTES_IN, TOKEN_BYTES_REWARD, TOKEN_BYTES_OUT = 12, 4, 12
"""What the buffer carries of a response's token: to the log (token, log-probability, about four bytes of text), the text to a
reward worker, and to the learner (token, log-probability, version)."""
SAMPLE_MESSAGES, STEP_MESSAGES = 5, 9
"""Of a response: itself, its acknowledgement, the task of grading it, the grade, its acknowledgement. Of a step: the requests
for plan and groups, the answers, the commit, and the acknowledgements; one message more is a group's ticket."""
MESSAGE_BYTES = 200
"""A message without its tokens: frames, names, numbers."""
MESSAGE_CPU_SECONDS = 60e-6
"""The buffer's work on a message, by `python -m tools.benchmarks.swarm` on a shared CPU core."""
STATUS_HZ = 2.0
"""Signs of life a second of each generator (`workers.generator.STATUS_S`)."""


class Load(Struct, frozen=True):
    """What the buffer carries: messages and megabytes a second, and the share of one CPU core that this takes."""

    messages: float
    megabytes: float
    core: float


class Figures(Struct, frozen=True):
    """Seconds, tokens a second, shares of time, versions; see the module's docstring."""

    steps: int
    step_seconds: float
    tokens_per_second: float
    """Response tokens that the buffer took in, those of dropped groups included."""
    learner_idle: float
    """The share of time in which the learner waits for groups, pulling them included."""
    generator_idle: float
    """The share of time in which a generator has no live sequence, the mean over generators."""
    lag_mean: float
    """Mean over steps of the mean over a step's trained tokens."""
    lag_p99: float
    lag_max: float
    """The smallest lag that 99 % of the trained tokens of all steps do not exceed, and the greatest."""
    in_system: float
    """Groups in the system after a step's commit, the mean over steps."""


class Forecast(Struct, frozen=True):
    """What only a simulation tells, beside `figures`."""

    figures: Figures
    slots_filled: float
    """The share of the generators' slots that has a sequence, the mean over time."""
    sync_seconds: float
    keep: float
    load: Load


def forecast(run: Simulated, *, first: int, last: int, sync_seconds: float) -> Forecast:
    """Steps `first` to `last` (from 1) of a simulated run that has one more. Raises ValueError for fewer than one cycle."""
    if not 1 <= first <= last < len(run.steps):
        raise ValueError(f"forecast: got steps {first} to {last} of {len(run.steps)}, expected one more than the last")
    steps, after = run.steps[first - 1 : last], run.steps[last]
    begin, end = steps[0].totals, after.totals
    seconds = after.started - steps[0].started
    count = len(steps)
    samples, tokens, groups = end.samples - begin.samples, end.tokens - begin.tokens, end.groups - begin.groups
    messages = (SAMPLE_MESSAGES * samples + groups + STEP_MESSAGES * count) / seconds + STATUS_HZ * run.generators
    trained = sum(step.tokens for step in steps)
    carried = tokens * (TOKEN_BYTES_IN + TOKEN_BYTES_REWARD) + trained * TOKEN_BYTES_OUT
    waits = sum(step.waited for step in (*steps[1:], after))
    return Forecast(
        figures=Figures(
            steps=count,
            step_seconds=seconds / count,
            tokens_per_second=tokens / seconds,
            learner_idle=waits / seconds,
            generator_idle=max(0.0, 1.0 - (end.busy_seconds - begin.busy_seconds) / (seconds * run.generators)),
            in_system=sum(step.in_system for step in steps) / count,
            **lag_figures([step.lags for step in steps]),
        ),
        slots_filled=(end.slot_seconds - begin.slot_seconds) / (seconds * run.slots),
        sync_seconds=sync_seconds,
        keep=run.kept / max(1, run.kept + run.dropped),
        load=Load(messages, (carried / seconds + messages * MESSAGE_BYTES) / 1e6, messages * MESSAGE_CPU_SECONDS),
    )


def lag_figures(steps: list[Mapping[int, float]]) -> dict[str, float]:
    """`lag_mean`, `lag_p99`, `lag_max` of steps, each as tokens by lag."""
    together: Counter[int] = Counter()
    means = []
    for step in steps:
        means.append(sum(lag * tokens for lag, tokens in step.items()) / sum(step.values()))
        together.update(step)
    reached, total = 0.0, sum(together.values())
    for p99 in sorted(together):
        reached += together[p99]
        if reached >= 0.99 * total:
            break
    return {"lag_mean": sum(means) / len(means), "lag_p99": float(p99), "lag_max": float(max(together))}


def steady(steps: int, max_lag: int) -> tuple[int, int]:
    """The first and the last step of a simulated run that neither its empty start nor its end (the ledger issues no more than
    the last steps need) touches. Raises ValueError for a run without such a step."""
    first, last = max_lag + 3, steps - max_lag - 2
    if last < first:
        raise ValueError(f"plan: got {steps} steps at max_lag {max_lag}, expected at least {2 * max_lag + 5}")
    return first, last
