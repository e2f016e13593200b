"""What a recorded run's parts took, what work it had, and what it came to: all from its log.

`costs` measures each part by itself (a decode pass, a grade, training, a commit, the way of new weights) over a stretch of
steps; `figures` are those that a simulation must come to, over another stretch or the same.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
from msgspec import Struct

from engine.config import Config, ConfigError, parse_config
from protocols.log import LogReader
from workers.measure import union
from workers.plan.costs import Costs, GeneratorCost, Group, LearnerCost, Recorded, RewardCost
from workers.plan.figures import Figures, lag_figures


class Stretch(Struct, frozen=True):
    """Steps `first` to `last`, with the one after them; times [last - first + 2] in Unix seconds, of each step."""

    first: int
    last: int
    started: np.ndarray
    finished: np.ndarray
    committed: np.ndarray
    waited: np.ndarray
    in_system: np.ndarray

    @property
    def begin(self) -> float:
        return float(self.started[0])

    @property
    def end(self) -> float:
        return float(self.started[-1])


def config_of(log: LogReader) -> Config:
    """The run's config. Raises `ConfigError` for a run that no generator took part in."""
    config = parse_config(log.meta.config, str(log.path))
    if not config.samples or config.generator is None:
        raise ConfigError(f"{log.path}: no generator sampled for training in this run; expected one that did")
    return config


def stretch(log: LogReader, first: int, last: int) -> Stretch:
    """Raises `ConfigError` where the run has no step after `last`, or less than two of them."""
    rows = log.query(
        "SELECT started_at, finished_at, committed_at, metrics FROM steps WHERE step BETWEEN ? AND ? ORDER BY step",
        first,
        last + 1,
    )
    if last <= first or len(rows) != last - first + 2:
        raise ConfigError(
            f"{log.path}: steps {first} to {last + 1} are needed, the log has {len(rows)} of them; expected a longer run"
        )
    metrics = [json.loads(row[3]) for row in rows]
    started, finished, committed = np.array([row[:3] for row in rows], dtype=np.float64).T
    waited, in_system = (np.array([each[name] for each in metrics]) for name in ("wait_s", "in_system"))
    return Stretch(first, last, started, finished, committed, waited, in_system)


def work(log: LogReader) -> Recorded:
    """Every group that was trained, dropped or planned, in the order in which they entered."""
    rows = log.query(
        """SELECT g.id, g.prompt_tokens, r.response_tokens, f.correct FROM groups AS g JOIN rollouts AS r ON r.group_id = g.id
        JOIN final_grades AS f ON f.group_id = g.id AND f.sample = r.sample
        WHERE g.kind = 'train' AND g.status IN ('trained', 'dropped') ORDER BY g.id, r.sample"""
    )
    groups = []
    for _, samples in groupby(rows, key=itemgetter(0)):
        found = list(samples)
        groups.append(Group(found[0][1], [row[2] for row in found], [bool(row[3]) for row in found]))
    if not groups:
        raise ConfigError(f"{log.path}: no group was trained; expected a run with steps")
    return Recorded(groups, in_order=True)


# --- what each part takes ------------------------------------------------------------------------------------------------


def costs(log: LogReader, config: Config, steps: Stretch) -> Costs:
    """The time of each part, measured between the first step's start and the start of the step after the last."""
    sent = log.query(
        "SELECT received_at - finished_at FROM rollouts WHERE received_at BETWEEN ? AND ?", steps.begin, steps.end
    )
    return Costs(
        generators=_generators(log, config, steps),
        learner=_learner(log, steps),
        reward=_reward(log, config, steps),
        sync_seconds=_sync(log, steps),
        send_seconds=max(0.0, float(np.median(sent))) if sent else 0.0,
    )


def _generators(log: LogReader, config: Config, steps: Stretch) -> list[GeneratorCost]:
    if config.generator is None:
        return []
    slots = config.generator.engine.slots
    found = []
    for (worker,) in log.query(
        "SELECT DISTINCT worker FROM rollouts WHERE received_at > ? ORDER BY worker", steps.begin
    ):
        rows = log.query("SELECT started_at, finished_at, response_tokens FROM rollouts WHERE worker = ?", worker)
        spans = np.array(rows, dtype=np.float64)
        inside = (spans[:, 1] >= steps.begin) & (spans[:, 1] <= steps.end)
        if inside.sum() >= 2:
            found.append(GeneratorCost(slots, _passes(spans, inside, slots)))
    if not found:
        raise ConfigError(f"{log.path}: no generator finished two responses in steps {steps.first} to {steps.last}")
    return found


def _passes(spans: np.ndarray, inside: np.ndarray, slots: int) -> list[tuple[float, float]]:
    """Seconds a token of the responses `inside`, as a straight line over how many were live beside them in the mean; scaled
    so that together these responses take the time that they took. Prompts and new weights are contained. `spans` [n, 3]."""
    times = np.concatenate([spans[:, 0], spans[:, 1]])
    order = np.argsort(times, kind="stable")
    live = np.cumsum(np.repeat([1.0, -1.0], len(spans))[order])
    integral = np.concatenate([[0.0], np.cumsum(live[:-1] * np.diff(times[order]))])
    start, end, tokens = spans[inside].T
    seconds = np.maximum(end - start, 1e-6)
    beside = (np.interp(end, times[order], integral) - np.interp(start, times[order], integral)) / seconds
    slope, level = _line(beside, seconds / tokens, tokens)
    scale = float(seconds.sum()) / float(((level + slope * beside) * tokens).sum())
    if slots == 1:
        return [(1, scale * (level + slope))]
    return [(1, scale * (level + slope)), (slots, scale * (level + slope * slots))]


def _line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Slope and level of the line through the points, by weighted least squares; neither below zero. All [n]."""
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = np.average((x - mean_x) ** 2, weights=weights)
    slope = np.average((x - mean_x) * (y - mean_y), weights=weights) / spread if spread > 1e-12 else 0.0
    slope = float(np.clip(slope, 0.0, mean_y / mean_x if mean_x > 0 else 0.0))
    return slope, float(mean_y - slope * mean_x)


def _learner(log: LogReader, steps: Stretch) -> LearnerCost:
    rows = log.query(
        """SELECT g.step, sum(r.response_tokens), max(f.received_at), (SELECT sum(prompt_tokens) FROM groups AS p WHERE p.step = g.step)
        FROM groups AS g JOIN rollouts AS r ON r.group_id = g.id JOIN grades AS f ON f.group_id = g.id AND f.sample = r.sample
        WHERE g.step BETWEEN ? AND ? GROUP BY g.step ORDER BY g.step""",
        steps.first,
        steps.last + 1,
    )
    tokens = np.array([row[1] + row[3] for row in rows], dtype=np.float64)
    ready = np.array([row[2] for row in rows])
    trained = steps.finished - steps.started
    slope, level = _line(tokens, trained, np.ones(len(tokens)))
    pulls = np.minimum(steps.waited, np.maximum(0.0, steps.started - ready))
    asked = steps.started[1:] - steps.waited[1:]
    return LearnerCost(
        token_seconds=slope,
        fixed_seconds=level,
        pull_seconds=float(pulls.mean()),
        commit_seconds=float(np.maximum(0.0, steps.committed - steps.finished).mean()),
        publish_seconds=float(np.maximum(0.0, asked - steps.committed[:-1]).mean()),
        unevenness=tuple((trained / (level + slope * tokens)).tolist()),
    )


def _reward(log: LogReader, config: Config, steps: Stretch) -> RewardCost:
    """A response that came while its worker was at another one waited; from that grade to its own is what a score takes. The
    others show what is on the way besides."""
    rows = log.query(
        """SELECT f.worker, f.received_at, r.received_at FROM grades AS f JOIN rollouts AS r ON r.group_id = f.group_id
        AND r.sample = f.sample WHERE f.received_at BETWEEN ? AND ? ORDER BY f.worker, f.received_at""",
        steps.begin,
        steps.end,
    )
    queued: list[float] = []
    alone: list[float] = []
    for (worker, before, _), (other, graded, came) in pairwise(rows):
        if worker == other:
            (queued if came < before else alone).append(graded - max(came, before))
    score = float(np.mean(queued)) if queued else 0.0
    reward = config.reward
    return RewardCost(
        workers=max(1, len({row[0] for row in rows})),
        scorers=reward.scorers,
        tasks_per_scorer=reward.tasks_per_scorer,
        score_seconds=score * reward.scorers,
        delay_seconds=max(0.0, float(np.median(alone)) - score) if alone else 0.0,
    )


def _sync(log: LogReader, steps: Stretch) -> float:
    """From a step's commit to the first sign of its weights: a response that starts on them or ends with tokens of them."""
    rows = log.query(
        "SELECT version_min, version_max, started_at, finished_at FROM rollouts WHERE version_max >= ? ORDER BY finished_at",
        steps.first,
    )
    signs: dict[int, float] = defaultdict(lambda: float("inf"))
    for low, high, started, finished in rows:
        signs[low] = min(signs[low], started)
        signs[high] = min(signs[high], finished)
    seen = [
        signs[step] - committed
        for step, committed in zip(range(steps.first, steps.last + 1), steps.committed, strict=False)
        if step in signs
    ]
    return max(0.0, float(np.median(seen))) if seen else 0.0


# --- what it came to -----------------------------------------------------------------------------------------------------


def figures(log: LogReader, steps: Stretch) -> Figures:
    """Of the run as it was."""
    seconds, count = steps.end - steps.begin, steps.last - steps.first + 1
    tokens = log.query(
        "SELECT coalesce(sum(response_tokens), 0) FROM rollouts WHERE received_at BETWEEN ? AND ?",
        steps.begin,
        steps.end,
    )
    return Figures(
        steps=count,
        step_seconds=seconds / count,
        tokens_per_second=float(tokens[0][0]) / seconds,
        learner_idle=float(steps.waited[1:].sum()) / seconds,
        generator_idle=1.0 - float(np.mean(list(_busy(log, steps)))) / seconds,
        in_system=float(steps.in_system[:-1].mean()),
        **lag_figures(list(_lags(log, steps))),
    )


def _busy(log: LogReader, steps: Stretch) -> Iterator[float]:
    """Seconds of the stretch in which each generator had a live sequence."""
    rows = log.query(
        "SELECT worker, started_at, finished_at FROM rollouts WHERE finished_at > ? AND started_at < ? ORDER BY worker",
        steps.begin,
        steps.end,
    )
    for _, spans in groupby(rows, key=itemgetter(0)):
        inside = np.clip(np.array([span[1:] for span in spans]), steps.begin, steps.end)
        busy = union(inside)
        yield float((busy[:, 1] - busy[:, 0]).sum())


def _lags(log: LogReader, steps: Stretch) -> Iterator[dict[int, float]]:
    """Of each step, its trained tokens by lag."""
    for step in range(steps.first, steps.last + 1):
        lags: dict[int, float] = defaultdict(float)
        for (runs,) in log.query(
            "SELECT r.versions FROM rollouts AS r JOIN groups AS g ON g.id = r.group_id WHERE g.step = ?", step
        ):
            for version, count in json.loads(runs):
                lags[step - 1 - version] += count
        yield dict(lags)
