"""What a run came to, measured from its log: tokens, accuracy, lag, each role's time, and how far they overlapped."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct

from engine.config import Config, parse_config
from protocols.log import LogReader
from workers.measure_documents import DocumentFigures, document_figures
from workers.measure_pages import PageFigures, page_figures, readings

PAGE_ROWS = 4096


class Evaluation(Struct, frozen=True):
    """Held-out accuracy of the weights after `step` steps, over graded samples; `version_*` are the weights that
    really sampled the tokens."""

    step: int
    accuracy: float
    prompts: int
    samples: int
    version_min: int
    version_max: int


class Lag(Struct, frozen=True):
    """Versions between the weights that sampled a trained token and those that it trained; over all tokens."""

    mean: float
    p99: float
    max: int
    masked_fraction: float


class RoleTime(Struct, frozen=True):
    """Seconds of one worker: joined to the run, at work, and the parts of its time by name."""

    name: str
    online_s: float
    busy_s: float
    parts: dict[str, float] = {}
    tokens: int = 0


class Overlap(Struct, frozen=True):
    """How far sampling and training went on at once. `sampled_while_training` is the share of the tokens sampled for
    training; `trained_while_sampling` the share of the training time."""

    sampled_while_training: float
    trained_while_sampling: float


class Report(Struct, frozen=True):
    """Everything the closing table shows; `report.json` is this."""

    run: str
    steps: int
    of_steps: int
    seconds: float
    evaluations: list[Evaluation]
    groups: dict[str, int]
    samples: dict[str, int]
    tokens: dict[str, int]
    keep_rate: float | None
    prompt_tokens_saved: float | None
    lag: Lag | None
    overlap: Overlap | None
    roles: list[RoleTime]
    documents: list[DocumentFigures] = []
    pages: list[PageFigures] = []
    readings: list[str] = []


def measure(log: LogReader) -> Report:
    """The figures of a log, whether its run has ended or not."""
    meta = log.meta
    config = parse_config(meta.config, str(log.path))
    kinds = "kind = 'train'" if log.query("SELECT 1 FROM groups WHERE kind = 'train' LIMIT 1") else "kind = 'ready'"
    statuses = log.query(
        f"""SELECT g.status, count(DISTINCT g.id), count(r.id), coalesce(sum(r.response_tokens), 0)
        FROM groups AS g LEFT JOIN rollouts AS r ON r.group_id = g.id WHERE g.{kinds} GROUP BY g.status"""
    )
    groups, samples, tokens = ({row[0]: int(row[i]) for row in statuses} for i in (1, 2, 3))
    evaluated = log.query(
        "SELECT coalesce(sum(response_tokens), 0) FROM rollouts JOIN groups AS g ON g.id = group_id WHERE kind = 'eval'"
    )
    decided = groups.get("trained", 0) + groups.get("dropped", 0)
    last = log.query("SELECT max(committed_at) FROM steps")[0][0] or meta.created_at
    return Report(
        run=meta.run,
        steps=log.last_step(),
        of_steps=config.steps,
        seconds=last - meta.created_at,
        evaluations=evaluations(log),
        groups=groups,
        samples=samples,
        tokens={**tokens, "evaluated": int(evaluated[0][0])},
        keep_rate=groups.get("trained", 0) / decided if decided else None,
        prompt_tokens_saved=tokens_saved(log),
        lag=token_lag(log, config.buffer.max_lag) if kinds == "kind = 'train'" else None,
        overlap=overlap(sampling_intervals(log), training_intervals(log)),
        roles=role_times(log, config),
        documents=document_figures(log),
        pages=page_figures(log),
        readings=readings(log),
    )


def tokens_saved(log: LogReader) -> float | None:
    """The share of the learner's input tokens that a prompt once for all its group's responses saved, the mean over steps.
    None where no step has the figure."""
    shares = [step.metrics["prompt_tokens_saved"] for step in log.steps() if "prompt_tokens_saved" in step.metrics]
    return math.fsum(shares) / len(shares) if shares else None


def evaluations(log: LogReader) -> list[Evaluation]:
    """Every complete evaluation, with the versions that its tokens came from."""
    versions = {
        step: (low, high)
        for step, low, high in log.query(
            """SELECT g.min_version, min(r.version_min), max(r.version_max) FROM groups AS g
            JOIN rollouts AS r ON r.group_id = g.id WHERE g.kind = 'eval' GROUP BY g.min_version"""
        )
    }
    return [
        Evaluation(
            int(e["eval_step"]), e["accuracy"], int(e["prompts"]), int(e["samples"]), *versions[int(e["eval_step"])]
        )
        for e in log.evaluations()
    ]


def token_lag(log: LogReader, max_lag: int) -> Lag | None:
    """Over the tokens of committed steps: step k trains weights version k - 1. None when there are none."""
    counts: Counter[int] = Counter()
    last = -1
    sql = """SELECT r.id, g.step, r.versions FROM rollouts AS r JOIN groups AS g ON g.id = r.group_id
        WHERE g.kind = 'train' AND g.status = 'trained' AND r.id > ? ORDER BY r.id LIMIT ?"""
    while page := log.query(sql, last, PAGE_ROWS):
        last = page[-1][0]
        for _, step, runs in page:
            for version, count in json.loads(runs):
                counts[step - 1 - version] += count
    if not counts:
        return None
    lags = np.array(sorted(counts))
    weights = np.array([counts[lag] for lag in lags.tolist()])
    cumulative = np.cumsum(weights) / weights.sum()
    return Lag(
        mean=float((lags * weights).sum() / weights.sum()),
        p99=float(lags[np.searchsorted(cumulative, 0.99)]),
        max=int(lags[-1]),
        masked_fraction=float(weights[lags > max_lag].sum() / weights.sum()),
    )


def sampling_intervals(log: LogReader) -> np.ndarray:
    """[n, 3]: start, end and tokens of every response sampled for training."""
    rows = log.query(
        """SELECT r.started_at, r.finished_at, r.response_tokens FROM rollouts AS r
        JOIN groups AS g ON g.id = r.group_id WHERE g.kind = 'train'"""
    )
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def training_intervals(log: LogReader) -> np.ndarray:
    """[n, 2]: start and end of every committed step's training."""
    rows = log.query("SELECT started_at, finished_at FROM steps ORDER BY step")
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def overlap(sampling: np.ndarray, training: np.ndarray) -> Overlap | None:
    """Each response's tokens are spread evenly over its time. None when nothing was sampled or trained.

    `sampling` [n, 3] start, end, tokens; `training` [m, 2] start, end; Unix seconds.
    """
    if not len(sampling) or not len(training):
        return None
    starts, ends, tokens = sampling.T
    spent = np.maximum(ends - starts, 1e-6)
    busy = union(training)
    share = (_covered(busy, starts + spent) - _covered(busy, starts)) / spent
    sampled = union(np.stack([starts, ends], axis=1))
    trained = _covered(sampled, busy[:, 1]) - _covered(sampled, busy[:, 0])
    return Overlap(
        sampled_while_training=float((share * tokens).sum() / tokens.sum()),
        trained_while_sampling=float(trained.sum() / max(1e-9, (busy[:, 1] - busy[:, 0]).sum())),
    )


def union(intervals: np.ndarray) -> np.ndarray:
    """The same time as disjoint intervals in order; [n, 2] to [k, 2]."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals.tolist()):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return np.array(merged, dtype=np.float64).reshape(-1, 2)


def _covered(disjoint: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How much of the disjoint intervals lies before each time."""
    ends = np.concatenate([[0.0], np.cumsum(disjoint[:, 1] - disjoint[:, 0])])
    points = np.stack([disjoint[:, 0], disjoint[:, 1]], axis=1).ravel()
    return np.interp(times, points, np.stack([ends[:-1], ends[1:]], axis=1).ravel())


# --- time per role -------------------------------------------------------------------------------------------------


def role_times(log: LogReader, config: Config) -> list[RoleTime]:
    """The learner's time by what it did, and of each generator and reward worker the time it was joined and at work."""
    names = ("train_s", "wait_s", "publish_s")
    sums = {
        name: math.fsum(value for step in log.steps() if math.isfinite(value := step.metrics.get(name, 0.0)))
        for name in names
    }
    learner = RoleTime(
        name="learner" if config.learner.ranks == 1 else f"learner ({config.learner.ranks} ranks)",
        online_s=sums["train_s"] + sums["wait_s"] + sums["publish_s"],
        busy_s=sums["train_s"],
        parts={name.removesuffix("_s"): value for name, value in sums.items()},
    )
    results = log.query("SELECT worker, finished_at FROM rollouts UNION ALL SELECT worker, received_at FROM grades")
    joins = log.query("SELECT at, kind, worker, detail FROM events WHERE kind IN ('joined', 'left') ORDER BY id")
    return [learner, *_generators(log, joins, results), *_rewards(log, joins, results)]


def _generators(log: LogReader, joins: Sequence[tuple], results: Sequence[tuple]) -> list[RoleTime]:
    found = []
    for worker, tokens in log.query(
        "SELECT worker, sum(response_tokens) FROM rollouts GROUP BY worker ORDER BY worker"
    ):
        if (online := online_seconds(worker, joins, results)) is not None:
            spans = log.query("SELECT started_at, finished_at FROM rollouts WHERE worker = ?", worker)
            busy = union(np.array(spans, dtype=np.float64))
            found.append(RoleTime(worker, online, float((busy[:, 1] - busy[:, 0]).sum()), tokens=tokens))
    return found


def _rewards(log: LogReader, joins: Sequence[tuple], results: Sequence[tuple]) -> list[RoleTime]:
    scored = log.query("SELECT worker, sum(seconds), count(*) FROM grades GROUP BY worker ORDER BY worker")
    return [
        RoleTime(worker, online, seconds, parts={"scores": float(count)})
        for worker, seconds, count in scored
        if (online := online_seconds(worker, joins, results)) is not None
    ]


def online_seconds(worker: str, joins: Sequence[tuple], results: Iterable[tuple]) -> float | None:
    """From each join of a worker to its leave, or to its last result where nobody saw it leave. None: it never joined."""
    events = [(at, kind) for at, kind, name, _ in joins if name == worker]
    if not events:
        return None
    times = sorted(at for name, at in results if name == worker)
    total = 0.0
    for i, (at, kind) in enumerate(events):
        if kind != "joined":
            continue
        following = events[i + 1] if i + 1 < len(events) else (math.inf, "end")
        own = [time for time in times if at <= time <= following[0]]
        end = following[0] if following[1] == "left" else max(own, default=at)
        total += end - at
    return total
