"""What `headrace show` prints: a group, a step, or the run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from protocols.log import GroupRow, LogReader, StepRow
from protocols.messages import Grade

LAST = 12
"""How many steps and events of a run are listed."""


class InspectError(ValueError):
    """A run, group or step that is not there, or a file that cannot be written; says what was found and expected."""


# --- a group ---------------------------------------------------------------------------------------------------------


def show_group(log: LogReader, number: int, console: Console) -> None:
    """The prompt, and of every sample its text, how it was made, and every attempt at grading it. Raises `InspectError`."""
    row = log.group(number)
    if row is None:
        raise InspectError(f"{log.path}: group {number} is not in the log; it has groups 0 to {log.next_group() - 1}")
    planned = log.query("SELECT step FROM plan WHERE group_id = ?", number)
    console.print(
        _facts(
            [
                ("group", f"{number} ({row.kind})"),
                ("status", _status(row, planned[0][0] if planned else None)),
                ("prompt", f"{row.prompt_id} of task {row.task}, {row.prompt.shape[0]} tokens"),
                ("answer", row.answer),
                ("issued", f"{_clock(row.issued_at)}, for weights of version {row.min_version} or newer"),
            ]
        )
    )
    console.print(Rule("prompt", style="dim"))
    console.print(Text(row.prompt_text))
    grades = {sample: list(own) for sample, own in itertools.groupby(log.grades(number), key=lambda g: g.sample)}
    arrivals = {
        sample: (worker, received)
        for sample, worker, received in log.query(
            "SELECT sample, worker, received_at FROM rollouts WHERE group_id = ?", number
        )
    }
    rollouts = {rollout.sample: rollout for rollout in log.rollouts(number)}
    for sample in range(row.samples):
        rollout = rollouts.get(sample)
        console.print(Rule(f"sample {sample}: {_outcome(grades.get(sample, []), rollout is not None)}", style="dim"))
        if rollout is None:
            continue
        worker, received = arrivals[sample]
        took = rollout.finished_at - rollout.started_at
        facts = [
            ("response", f"{rollout.tokens.shape[0]} tokens, finish {rollout.finish}, fence {rollout.fence}"),
            ("weights", ", ".join(f"version {v}: {n} tokens" for v, n in rollout.versions)),
            ("made", f"by {worker}, {_clock(rollout.started_at)} in {took:.1f} s, here at {_clock(received)}"),
            *((f"attempt {grade.attempt}", _attempt(grade)) for grade in grades.get(sample, [])),
        ]
        console.print(_facts(facts))
        console.print(Padding(Text(rollout.text), (0, 0, 0, 2)))


def _status(row: GroupRow, planned: int | None) -> str:
    match row.status:
        case "trained":
            return f"trained in step {row.step}"
        case "waiting" if planned is not None:
            return f"waiting: in the plan of step {planned}, which is not committed"
        case _:
            return row.status + (f": {row.reason}" if row.reason else "")


def _outcome(grades: Sequence[Grade], responded: bool) -> str:
    if not grades:
        return "not graded yet" if responded else "no response yet"
    final = max(grades, key=lambda g: (g.verdict == "graded", g.attempt))
    if final.verdict != "graded":
        return f"not graded ({final.verdict}), left out of training"
    return f"{'right' if final.correct else 'wrong'}, reward {final.reward:g}"


def _attempt(grade: Grade) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in grade.parts.items())
    said = [grade.verdict, f"reward {grade.reward:g}" if grade.verdict == "graded" else "", parts, grade.detail]
    return "; ".join(filter(None, said)) + f" ({grade.seconds:.2f} s)"


# --- a step ----------------------------------------------------------------------------------------------------------


def show_step(log: LogReader, number: int, console: Console) -> None:
    """Its groups in training order, who waited for what, and its metrics. Raises `InspectError`."""
    committed, groups = log.step(number), log.plan(number)
    if groups is None:
        raise InspectError(
            f"{log.path}: step {number} is not planned yet; the last committed step is {log.last_step()}"
        )
    rows = [_group_figures(log, group) for group in groups]
    facts = [("step", f"{number}, {len(groups)} groups" + ("" if committed else "; not committed"))]
    if committed:
        facts += [
            ("weights", committed.weights_hash),
            ("code", committed.code_version),
            ("trained", f"{_clock(committed.started_at)} to {_clock(committed.finished_at)}"),
        ]
    facts += _waits(log, number, committed, rows)
    console.print(_facts(facts))
    table = Table(
        "group", "prompt", "right", "reward", "tokens", "versions", "issued", "graded", box=None, pad_edge=False
    )
    for row in rows:
        table.add_row(
            str(row["group"]), Text(row["prompt_id"]), f"{row['right']}/{row['graded']}", f"{row['reward']:.2f}",
            f"{row['prompt_tokens']} + {row['tokens']}", f"{row['version_min']}-{row['version_max']}",
            _clock(row["issued_at"]), _clock(row["graded_at"]),
        )  # fmt: skip
    console.print(table)
    if committed:
        console.print(Rule("metrics", style="dim"))
        console.print(_facts([(name, f"{value:.6g}") for name, value in sorted(committed.metrics.items())]))


def _group_figures(log: LogReader, group: int) -> dict[str, Any]:
    names = (
        "group", "prompt_id", "issued_at", "prompt_tokens", "right", "graded", "reward", "tokens", "version_min",
        "version_max", "graded_at", "finished_at",
    )  # fmt: skip
    sql = """SELECT g.id, g.prompt_id, g.issued_at, g.prompt_tokens, coalesce(sum(f.verdict = 'graded' AND f.correct), 0),
        count(CASE f.verdict WHEN 'graded' THEN 1 END), avg(CASE f.verdict WHEN 'graded' THEN f.reward END),
        sum(r.response_tokens), min(r.version_min), max(r.version_max), max(f.received_at), max(r.finished_at)
        FROM groups AS g JOIN rollouts AS r ON r.group_id = g.id
        JOIN final_grades AS f ON f.group_id = r.group_id AND f.sample = r.sample WHERE g.id = ?"""
    return dict(zip(names, log.query(sql, group)[0], strict=True))


def _waits(
    log: LogReader, step: int, committed: StepRow | None, rows: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    """Who waited for what: the learner for its last group, or the groups for the learner."""
    last = max(rows, key=lambda row: row["graded_at"])
    before = log.step(step - 1)
    free_at = before.finished_at if before else log.meta.created_at
    lines = []
    if committed and "wait_s" in committed.metrics:
        free_at = committed.started_at - committed.metrics["wait_s"]
        trained = committed.finished_at - committed.started_at
        lines.append(("learner", f"waited {committed.metrics['wait_s']:.2f} s for its groups, trained {trained:.2f} s"))
    if last["graded_at"] > free_at:
        grading = last["graded_at"] - last["finished_at"]
        lines.append(
            (
                "last group",
                f"{last['group']} was ready {last['graded_at'] - free_at:.2f} s after the learner was free; "
                f"its last response took {last['finished_at'] - last['issued_at']:.2f} s from issue, grading {grading:.2f} s",
            )
        )
    else:
        lines.append(
            ("last group", f"{last['group']} was ready {free_at - last['graded_at']:.2f} s before the learner was free")
        )
    return lines


# --- the run ---------------------------------------------------------------------------------------------------------


def show_run(log: LogReader, console: Console) -> None:
    """How the run stands: groups by what became of them, evaluations, the latest steps and events."""
    meta = log.meta
    last = log.last_step()
    facts = [
        ("run", meta.run),
        ("log", f"{log.path}, {log.path.stat().st_size / 1e6:.1f} MB"),
        ("made", f"{datetime.fromtimestamp(meta.created_at):%Y-%m-%d %H:%M:%S}, code {meta.code_version}"),
        ("steps", f"{last} of {meta.config.get('steps', '?')} committed"),
    ]
    facts += [
        (f"held-out {e['eval_step']}", f"accuracy {e['accuracy']:.3f} on {e['prompts']:.0f} prompts")
        for e in log.evaluations()
    ]
    console.print(_facts(facts))
    table = Table("kind", "status", "groups", "responses", "tokens", box=None, pad_edge=False)
    for (kind, status), counts in sorted(log.counts().items()):
        table.add_row(kind, status, *(f"{count:,}" for count in counts))
    console.print(table)
    _show_reasons(log, console)
    _show_last_steps(log, last, console)
    events = log.query("SELECT at, kind, worker, detail FROM events ORDER BY id DESC LIMIT ?", LAST)
    if events:
        console.print(Rule("latest events", style="dim"))
        console.print(
            _facts([(_clock(at), f"{worker} {kind}: {detail}") for at, kind, worker, detail in reversed(events)])
        )


def _show_reasons(log: LogReader, console: Console) -> None:
    reasons = log.query("SELECT status, reason, count(*) FROM groups WHERE reason IS NOT NULL GROUP BY status, reason")
    if reasons:
        console.print(_facts([(f"{status}", f"{count:,} groups: {reason}") for status, reason, count in reasons]))


def _show_last_steps(log: LogReader, last: int, console: Console) -> None:
    rows = [row for row in (log.step(n) for n in range(max(1, last - LAST + 1), last + 1)) if row is not None]
    if not rows:
        return
    console.print(Rule("latest steps", style="dim"))
    names = [n for n in ("accuracy", "reward_mean", "loss", "entropy", "lag_mean", "wait_s") if n in rows[-1].metrics]
    table = Table("step", "trained", "seconds", *names, "weights", box=None, pad_edge=False)
    for row in rows:
        seconds = f"{row.finished_at - row.started_at:.1f}"
        figures = (f"{row.metrics[n]:.4g}" if n in row.metrics else "" for n in names)
        table.add_row(str(row.step), _clock(row.finished_at), seconds, *figures, row.weights_hash[:12])
    console.print(table)


# --- how it looks ----------------------------------------------------------------------------------------------------


def _facts(facts: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%H:%M:%S}"
