"""Checks of steps: their plans, and the files beside the log that say the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from protocols.log import Log, LogError
from workers.audit_check import Audited, Check, each
from workers.metrics import MetricsError, read_metrics


def database(audited: Audited) -> Check:
    """SQLite's own checks of the file, and of what rows refer to."""
    found = [str(text) for (text,) in audited.log.query("PRAGMA quick_check")]
    violations = [] if found == ["ok"] else found
    try:
        violations += each(audited.log.query("PRAGMA foreign_key_check"), "row {1} of {0} refers to nothing in {2}")
    except LogError as error:  # tables that are not what the schema says
        violations.append(str(error))
    pages = audited.log.query("PRAGMA page_count")[0][0] * audited.log.query("PRAGMA page_size")[0][0]
    return Check(f"{pages / 2**20:.1f} MiB of tables and what they refer to", violations)


def plans(audited: Audited) -> Check:
    """Steps follow one another; each has its whole plan, in places 0 to n - 1; one step at most is planned ahead."""
    log = audited.log
    steps = log.query(
        """SELECT s.step, s.config_id, coalesce(json_extract(s.metrics, '$.updates'), 1), count(p.group_id), min(p.position),
        max(p.position) FROM steps AS s LEFT JOIN plan AS p ON p.step = s.step GROUP BY s.step ORDER BY s.step"""
    )
    violations = []
    for expected, (step, config_id, updates, groups, first, last) in enumerate(steps, start=1):
        if step != expected:
            violations.append(f"step {expected} is missing; the log goes on with step {step}")
            break
        wanted = audited.setting(audited.configs[config_id], "buffer", "groups_per_step", 0)
        if groups == 0 and audited.copied and updates == 0:
            continue  # a filter left nothing of this step's groups
        if not groups or (groups != wanted and not audited.copied):
            violations.append(f"step {step}: its plan has {groups} groups, expected {wanted}")
        elif (first, last) != (0, groups - 1):
            violations.append(f"step {step}: its plan has places {first} to {last}, expected 0 to {groups - 1}")
    ahead = log.query("SELECT DISTINCT step FROM plan WHERE step > ? ORDER BY step", audited.last)
    allowed = audited.last + 1
    violations += [
        f"step {s} is planned, and step {allowed} comes next" for (s,) in ahead if s > allowed and not audited.copied
    ]
    planned = log.query("SELECT count(*) FROM plan")[0][0]
    return Check(f"{len(steps)} committed steps, {planned} groups planned, {len(ahead)} steps ahead", violations)


def trained_once(audited: Audited) -> Check:
    """A group of a committed step's plan is trained, in that step and in no other; no other group is."""
    log = audited.log
    violations = each(
        log.query("SELECT group_id, count(*), group_concat(step) FROM plan GROUP BY group_id HAVING count(*) > 1"),
        "group {0} is planned {1} times: in steps {2}",
    )
    violations += each(
        log.query(
            """SELECT p.group_id, p.step, g.status, g.step FROM plan AS p LEFT JOIN groups AS g ON g.id = p.group_id
            WHERE p.step <= ? AND (g.status IS NOT 'trained' OR g.step IS NOT p.step) ORDER BY p.group_id""",
            audited.last,
        ),
        "group {0} is in the plan of step {1}, which is committed; it is {2} in step {3}",
    )
    violations += each(
        log.query(
            """SELECT id, step FROM groups WHERE status = 'trained'
            AND NOT EXISTS (SELECT 1 FROM plan WHERE group_id = groups.id AND plan.step = groups.step) ORDER BY id"""
        ),
        "group {0} is trained in step {1}, whose plan does not have it",
    )
    violations += each(
        log.query("SELECT id, status, step FROM groups WHERE status != 'trained' AND step IS NOT NULL ORDER BY id"),
        "group {0} is {1} and says that step {2} trained it",
    )
    trained = log.query("SELECT count(*) FROM groups WHERE status = 'trained'")[0][0]
    return Check(f"{trained} groups trained in {audited.last} steps", violations)


def metrics(audited: Audited) -> Check:
    """`metrics.jsonl` has one line for each committed step and each evaluation, with the log's figures. Of a run that goes
    on the last of each may be on its way."""
    folder = audited.log.path.parent
    try:
        history = read_metrics(folder)
    except MetricsError as error:
        return Check("no whole file", [str(error)])
    if audited.copied == "regrade":
        return Check("none: the log was made by grading another one anew", [])
    expected = {
        int(step): _numbers(json.loads(text)) for step, text in audited.log.query("SELECT step, metrics FROM steps")
    }
    evaluations = {int(e["eval_step"]): _numbers(e) for e in audited.log.evaluations()}
    live = _is_written(audited.log)
    violations = [
        *_compare("step", expected, history.steps, live=live),
        *_compare("eval_step", evaluations, history.evals, live=live),
    ]
    return Check(f"{len(history.steps)} steps, {len(history.evals)} evaluations in metrics.jsonl", violations)


def _compare(
    key: str, expected: Mapping[int, dict[str, Any]], rows: list[dict[str, Any]], *, live: bool
) -> Iterator[str]:
    seen: set[int] = set()
    for row in rows:
        step = int(row[key])
        if step in seen:
            yield f"{key} {step} has two lines"
        seen.add(step)
        wanted = expected.get(step)
        if wanted is None:
            if not (live and step > max(expected, default=0)):
                yield f"{key} {step} has a line, and the log does not have it"
            continue
        got = {name: value for name, value in row.items() if name not in (key, "time")}
        wrong = sorted(name for name in {*got, *wanted} - {key} if got.get(name) != wanted.get(name))
        if wrong:
            name = wrong[0]
            yield f"{key} {step}: {name} is {got.get(name)}, the log has {wanted.get(name)} ({len(wrong)} figures differ)"
    newest = max(expected, default=None) if live else None
    yield from (f"{key} {step} has no line" for step in sorted(expected.keys() - seen) if step != newest)


def checkpoints(audited: Audited) -> Check:
    """A checkpoint names the weights that the log has of its step. The last step's is written before its commit."""
    root = audited.log.path.parent / "checkpoints"
    hashes = dict(audited.log.query("SELECT step, weights_hash FROM steps"))
    violations, count = [], 0
    for folder in sorted(root.glob("step-*[0-9]")):
        count += 1
        step = int(folder.name.removeprefix("step-"))
        if step == audited.last + 1 == int(audited.config["steps"]):
            continue
        named = _named_hash(folder)
        if step not in hashes:
            violations.append(f"{folder.name}: the log has no step {step}")
        elif named != hashes[step]:
            violations.append(f"{folder.name}: its weights are {named}, the log has {hashes[step]}")
    complete = audited.last > 0 and audited.last == int(audited.config["steps"]) and audited.copied != "regrade"
    if complete and not (root / f"step-{audited.last:06d}").is_dir():
        violations.append(f"the run has all its {audited.last} steps, and no checkpoint of the last one")
    return Check(f"{count} checkpoints", violations)


def _named_hash(folder: Path) -> str:
    try:
        return str(json.loads((folder / "headrace.json").read_text(encoding="utf-8"))["meta"]["weights_hash"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unknown ({error!r})"


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    """As a line of metrics has them: what is not finite is null."""
    return {name: v if v is not None and math.isfinite(v) else None for name, v in figures.items()}


def _is_written(log: Log) -> bool:
    """Whether a process writes this log now."""
    still = Log.open_still(log.path)
    still.close()
    return not still.still
