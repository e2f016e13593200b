"""Checks of groups: their responses and grades, who made them, and what became of them."""

from __future__ import annotations

import json

from workers.audit_check import Audited, Check, each
from workers.run_state import FENCES_PER_START

_SUMS = """SELECT g.id, g.kind, g.status, g.reason, g.step, g.samples, count(r.id), sum(f.verdict = 'graded'),
    sum(f.verdict = 'graded' AND f.correct), sum(f.verdict != 'graded'), sum(f.verdict IS NULL)
    FROM groups AS g LEFT JOIN rollouts AS r ON r.group_id = g.id
    LEFT JOIN final_grades AS f ON f.group_id = r.group_id AND f.sample = r.sample"""
"""A group's samples, its responses, and of those: graded, right, failed for good, without any verdict."""


def samples(audited: Audited) -> Check:
    """A group that is planned or trained has a response of every sample, and each a final verdict: graded, or given up
    after `reward.attempts`. At least two are graded (one, of a group of one)."""
    attempts = 1 if audited.copied else audited.least("reward", "attempts", 2)
    violations, responses, failures = [], 0, 0
    groups = audited.log.query(f"{_SUMS} WHERE g.id IN (SELECT group_id FROM plan) GROUP BY g.id ORDER BY g.id")
    for group, _, _, _, _, wanted, there, graded, _, failed, open_ in groups:
        responses, failures = responses + there, failures + (failed or 0)
        if there != wanted:
            violations.append(f"group {group} has {there} responses, expected {wanted}")
        if open_ and there:
            violations.append(f"group {group}: {open_} of its {there} responses have no verdict")
        if (graded or 0) < min(2, wanted):
            violations.append(f"group {group}: {graded or 0} of {wanted} samples are graded, expected {min(2, wanted)}")
    violations += each(
        audited.log.query(
            """SELECT a.group_id, a.sample, count(*), ?1 FROM grades AS a JOIN plan AS p ON p.group_id = a.group_id
            GROUP BY a.group_id, a.sample HAVING sum(a.verdict = 'graded') = 0 AND count(*) < ?1""",
            attempts,
        ),
        "group {0} sample {1} was given up after {2} attempts, expected {3}",
    )
    return Check(f"{responses} responses of {len(groups)} planned groups, {failures} of them not gradable", violations)


def responses(audited: Audited) -> Check:
    """No response, and no verdict on one attempt, is there twice or belongs to nothing; tokens and versions add up."""
    log = audited.log
    violations = each(
        log.query("SELECT group_id, sample, count(*) FROM rollouts GROUP BY group_id, sample HAVING count(*) > 1"),
        "group {0} sample {1} has {2} responses",
    )
    violations += each(
        log.query(
            "SELECT group_id, sample, attempt, count(*) FROM grades GROUP BY group_id, sample, attempt HAVING count(*) > 1"
        ),
        "group {0} sample {1} has {3} verdicts on attempt {2}",
    )
    violations += each(
        log.query(
            """SELECT group_id, sample FROM grades AS a WHERE NOT EXISTS
            (SELECT 1 FROM rollouts AS r WHERE r.group_id = a.group_id AND r.sample = a.sample)"""
        ),
        "group {0} sample {1} has a verdict and no response",
    )
    violations += each(
        log.query(
            """SELECT r.group_id, r.sample, g.samples FROM rollouts AS r LEFT JOIN groups AS g ON g.id = r.group_id
            WHERE g.id IS NULL OR r.sample NOT BETWEEN 0 AND g.samples - 1"""
        ),
        "group {0} sample {1}: no such sample; the group has {2}",
    )
    violations += each(
        log.query(
            """SELECT group_id, sample, response_tokens FROM rollouts WHERE response_tokens < 1
            OR length(tokens) != 4 * response_tokens OR length(logprobs) != 4 * response_tokens
            OR response_tokens != (SELECT sum(json_extract(value, '$[1]')) FROM json_each(versions))
            OR version_min != (SELECT min(json_extract(value, '$[0]')) FROM json_each(versions))
            OR version_max != (SELECT max(json_extract(value, '$[0]')) FROM json_each(versions))"""
        ),
        "group {0} sample {1}: tokens, log-probabilities and versions do not come to the same {2} tokens",
    )
    count, grades = (log.query(f"SELECT count(*) FROM {table}")[0][0] for table in ("rollouts", "grades"))
    return Check(f"{count} responses, {grades} verdicts", violations)


def fences(audited: Audited) -> Check:
    """A response that a generator made carries a fence that was given out by the process that took it. Each that serves the
    run has a range of its own: in order of arrival none is of an earlier range than one before it. Times do not count, for
    a clock may have been set back."""
    log = audited.log
    if audited.copied:
        return Check(f"none: the log was made by {audited.copied} of another one", [])
    starts = log.query("SELECT count(*) FROM events WHERE kind = 'started'")[0][0]
    names = {worker for (worker,) in log.query("SELECT DISTINCT worker FROM events WHERE kind = 'joined'")}
    violations, serving = [], 0
    rows = log.query(
        """SELECT r.group_id, r.sample, r.fence, r.worker FROM rollouts AS r
        JOIN groups AS g ON g.id = r.group_id WHERE g.kind != 'ready' ORDER BY r.id"""
    )
    for group, sample, fence, worker in rows:
        of, number = divmod(fence, FENCES_PER_START)
        if number < 1 or of >= starts:
            violations.append(f"group {group} sample {sample}: fence {fence} was never given out")
            continue
        serving = max(serving, of)
        if of < serving:
            violations.append(
                f"group {group} sample {sample}: fence {fence} is of start {of + 1} of the buffer, taken by start {serving + 1}"
            )
        elif worker not in names:
            violations.append(f"group {group} sample {sample}: made by {worker}, which never joined")
    return Check(f"{len(rows)} responses under fences of {starts} starts of the buffer", violations)


def versions(audited: Audited) -> Check:
    """No token of a step's groups is from weights newer than those that the step trains; how many are older than the
    lag bound, and so masked, is counted."""
    log = audited.log
    violations = each(
        log.query(
            """SELECT r.group_id, r.sample, r.version_max, p.step FROM plan AS p JOIN rollouts AS r ON r.group_id = p.group_id
            WHERE r.version_max > p.step - 1 ORDER BY r.id"""
        ),
        "group {0} sample {1} has tokens of version {2}, and step {3} trains it",
    )
    if not audited.copied:
        violations += each(
            log.query(
                "SELECT group_id, sample, version_max FROM rollouts WHERE version_max > ? ORDER BY id", audited.last
            ),
            f"group {{0}} sample {{1}} has tokens of version {{2}}, and the log has {audited.last} steps",
        )
    tokens = late = lag_sum = lag_max = 0
    for step, config_id, text in log.query(
        """SELECT s.step, s.config_id, r.versions FROM steps AS s JOIN plan AS p ON p.step = s.step
        JOIN rollouts AS r ON r.group_id = p.group_id"""
    ):
        bound = audited.setting(audited.configs[config_id], "buffer", "max_lag", 1)
        for version, count in json.loads(text):
            lag = step - 1 - version
            tokens, lag_sum, lag_max = tokens + count, lag_sum + lag * count, max(lag_max, lag)
            late += count * (lag > bound)
    mean, share = lag_sum / max(1, tokens), 100 * late / max(1, tokens)
    return Check(
        f"{tokens} trained tokens, lag {mean:.2f} in the mean, {lag_max} at most, {share:.1f} % beyond the bound",
        violations,
    )


def dropped(audited: Audited) -> Check:
    """What was dropped is complete and uninformative, for the reason that it names; what failed has too few graded."""
    violations = []
    rows = audited.log.query(f"{_SUMS} WHERE g.status IN ('dropped', 'failed') GROUP BY g.id ORDER BY g.id")
    for group, _, status, reason, _, wanted, there, graded, right, failed, _ in rows:
        graded, right, failed = graded or 0, right or 0, failed or 0
        if there != wanted or graded + failed != wanted:
            violations.append(
                f"group {group} is {status} with {there} responses and {graded + failed} verdicts of {wanted}"
            )
        elif status == "failed" and graded >= min(2, wanted):
            violations.append(f"group {group} is failed, and {graded} of its {wanted} samples are graded")
        elif status == "dropped" and (graded < min(2, wanted) or 0 < right < graded):
            violations.append(
                f"group {group} is dropped, and {right} of {graded} graded samples are right: it is informative"
            )
        elif status == "dropped" and reason != ("all correct" if right else "all wrong"):
            violations.append(
                f'group {group} is dropped as "{reason}", and {right} of {graded} graded samples are right'
            )
    count = sum(row[2] == "dropped" for row in rows)
    return Check(f"{count} dropped and {len(rows) - count} failed groups", violations)


def informative(audited: Audited) -> Check:
    """With dynamic sampling, what is planned is neither all right nor all wrong."""
    if audited.switched_off("buffer", "dynamic_sampling", True):
        return Check("none: the run had dynamic sampling switched off", [])
    rows = audited.log.query(
        f"{_SUMS} WHERE g.kind = 'train' AND g.id IN (SELECT group_id FROM plan) GROUP BY g.id ORDER BY g.id"
    )
    if audited.copied == "regrade":
        rows = []  # the plan is the other run's, and what it says of a group may be different now
    violations = [
        f"group {group} is planned, and {right} of {graded} graded samples are right"
        for group, _, _, _, _, _, _, graded, right, _, _ in rows
        if graded and right in (0, graded)
    ]
    return Check(f"{len(rows)} planned groups", violations)


def statuses(audited: Audited) -> Check:
    """A group that waits lacks a verdict, or is informative and waits for its step; evaluation has its own status."""
    violations = each(
        audited.log.query(
            """SELECT id, kind, status FROM groups WHERE kind = 'eval' AND status IN ('trained', 'dropped', 'failed')
            OR kind != 'eval' AND status = 'evaluated' ORDER BY id"""
        ),
        "group {0} of kind {1} is {2}",
    )
    dynamic = not audited.switched_off("buffer", "dynamic_sampling", True) and not audited.copied
    rows = audited.log.query(f"{_SUMS} WHERE g.status IN ('waiting', 'evaluated') GROUP BY g.id ORDER BY g.id")
    for group, kind, status, _, _, wanted, there, graded, right, _, open_ in rows:
        if status == "evaluated" and (there != wanted or open_):
            violations.append(
                f"group {group} is evaluated with {there} of {wanted} responses, {open_} without a verdict"
            )
        elif status == "waiting" and graded == wanted and kind == "eval":
            violations.append(f"group {group} has all its grades and is not evaluated")
        elif status == "waiting" and graded == wanted and kind == "train" and dynamic and right in (0, graded):
            violations.append(f"group {group} has all its grades, {right} of {graded} right, and is not dropped")
    waiting = sum(row[2] == "waiting" for row in rows)
    return Check(f"{waiting} groups wait, {len(rows) - waiting} evaluated", violations)


def prompts(audited: Audited) -> Check:
    """No prompt of the stream was drawn twice, and no held-out prompt twice for one evaluation."""
    log = audited.log
    violations = each(
        log.query(
            """SELECT source_index, kind, group_concat(id) FROM groups WHERE kind != 'eval'
            GROUP BY kind, source_index HAVING count(*) > 1 ORDER BY source_index"""
        ),
        "prompt {0} of the stream was drawn as groups {2}",
    )
    violations += each(
        log.query(
            """SELECT source_index, min_version, group_concat(id) FROM groups WHERE kind = 'eval'
            GROUP BY min_version, source_index HAVING count(*) > 1 ORDER BY source_index"""
        ),
        "held-out prompt {0} was asked twice after step {1}, as groups {2}",
    )
    lost = log.query("SELECT id FROM groups WHERE NOT EXISTS (SELECT 1 FROM prompts WHERE group_id = groups.id)")
    violations += each(lost, "group {0} has no prompt")
    count = log.query("SELECT count(*) FROM groups")[0][0]
    return Check(f"{count} groups", violations)
