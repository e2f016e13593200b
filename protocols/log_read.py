"""Reading a log: rows as structs, training data as columns. Works while another process writes.

Every method is one short read transaction or a sequence of them by pages, so that no reader keeps the writer from
recycling the write-ahead log, and memory does not grow with the log.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from protocols.closable import Closable
from protocols.log_rows import Event, GroupRow, Kind, Meta, OpenGroup, Origin, SampleState, Start, Status, StepRow
from protocols.log_schema import SCHEMA, LogError
from protocols.messages import BOOL, FLOAT, INT, Batch, Grade, GroupSize, Rollout

PAGE_ROWS = 256

_GROUP = """SELECT g.id, g.kind, g.source_index, g.task, g.prompt_id, p.tokens, p.text, p.answer, g.samples, g.seed,
    g.min_version, g.issued_at, g.status, g.reason, g.step FROM groups AS g JOIN prompts AS p ON p.group_id = g.id"""
_ROLLOUT = """SELECT group_id, sample, fence, tokens, logprobs, versions, finish, text, started_at, finished_at
    FROM rollouts WHERE group_id = ? ORDER BY sample"""
_GRADE = """SELECT group_id, sample, attempt, verdict, correct, reward, parts, detail, seconds
    FROM grades WHERE group_id = ? ORDER BY sample, attempt"""
# Sorted by the caller: a sort here would carry every blob through SQLite's sorter.
_BATCH = """SELECT j.key, r.sample, r.response_tokens, r.versions, r.tokens, r.logprobs, r.finish = 'length', f.reward, f.correct
    FROM json_each(?) AS j JOIN rollouts AS r ON r.group_id = j.value
    JOIN final_grades AS f ON f.group_id = r.group_id AND f.sample = r.sample
    WHERE f.verdict = 'graded'"""
_SIZES = """SELECT j.key, r.response_tokens FROM json_each(?) AS j JOIN rollouts AS r ON r.group_id = j.value
    WHERE EXISTS (SELECT 1 FROM grades AS f WHERE f.group_id = r.group_id AND f.sample = r.sample
        AND f.verdict = 'graded') ORDER BY j.key, r.sample"""
_OPEN = "g.status = 'waiting' AND NOT EXISTS (SELECT 1 FROM plan WHERE plan.group_id = g.id)"
_EVALUATION = """SELECT g.min_version, avg(s.correct), avg(s.reward), avg(s.response_tokens), count(DISTINCT g.id),
    count(s.correct), max(s.finished_at) - min(s.started_at)
    FROM groups AS g JOIN samples AS s ON s.group_id = g.id WHERE g.kind = 'eval'"""


class LogReader(Closable):
    """A log, read. Raises `LogError` when the file turns out to be damaged."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    def close(self) -> None:
        self._connection.close()

    # --- the run --------------------------------------------------------------------------------------------------

    @property
    def meta(self) -> Meta:
        found = dict(self.query("SELECT key, value FROM meta"))
        try:
            return Meta(
                run=found["run"],
                config=json.loads(found["config"]),
                code_version=found["code_version"],
                created_at=float(found["created_at"]),
                schema=SCHEMA,
                start=msgspec.json.decode(found.get("start", "null"), type=Start | None),
                critic=msgspec.json.decode(found.get("critic", "null"), type=Start | None),
                origin=msgspec.json.decode(found.get("origin", "null"), type=Origin | None),
            )
        except (KeyError, ValueError, msgspec.MsgspecError) as error:
            raise LogError(
                f"{self.path}: table meta: {error}; expected run, config, code_version, created_at"
            ) from error

    def counts(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """By (kind, status): groups, responses, response tokens."""
        groups = self.query("SELECT kind, status, count(*) FROM groups GROUP BY kind, status")
        responses = self.query(
            """SELECT g.kind, g.status, count(*), sum(r.response_tokens) FROM rollouts AS r JOIN groups AS g
            ON g.id = r.group_id GROUP BY g.kind, g.status"""
        )
        held = {(kind, status): (count, tokens) for kind, status, count, tokens in responses}
        return {(kind, status): (n, *held.get((kind, status), (0, 0))) for kind, status, n in groups}

    def next_group(self) -> int:
        return int(self.query("SELECT coalesce(max(id) + 1, 0) FROM groups")[0][0])

    def next_source_index(self, kind: str) -> int:
        """Where the stream of prompts of this kind goes on."""
        found = self.query("SELECT coalesce(max(source_index) + 1, 0) FROM groups WHERE kind = ?", kind)
        return int(found[0][0])

    def events(self) -> Iterator[Event]:
        """All events, oldest first."""
        last = 0
        while page := self.query(f"SELECT * FROM events WHERE id > ? ORDER BY id LIMIT {PAGE_ROWS}", last):
            last = page[-1][0]
            yield from (Event(*row[1:]) for row in page)

    # --- groups ---------------------------------------------------------------------------------------------------

    def group(self, group: int) -> GroupRow | None:
        found = self.query(f"{_GROUP} WHERE g.id = ?", group)
        return self._group(found[0]) if found else None

    def groups(self, *, kind: Kind | None = None, status: Status | None = None) -> Iterator[GroupRow]:
        """Groups in the order in which they were issued."""
        return self._pages("(?1 IS NULL OR g.kind = ?1) AND (?2 IS NULL OR g.status = ?2)", kind, status)

    def unfinished(self) -> Iterator[OpenGroup]:
        """What a ledger is rebuilt from, together with `planned`: groups that wait and are in no plan."""
        for row in self._pages(_OPEN):
            attempts: dict[int, list[tuple[int, str, bool]]] = {}
            for grade in self.grades(row.group):
                attempts.setdefault(grade.sample, []).append((grade.attempt, grade.verdict, grade.correct))
            found = self.query(
                "SELECT sample, response_tokens FROM rollouts WHERE group_id = ? ORDER BY sample", row.group
            )
            yield OpenGroup(row, [SampleState(sample, size, attempts.get(sample, [])) for sample, size in found])

    def rollouts(self, group: int) -> list[Rollout]:
        """The responses of a group, in sample order."""
        return [self._rollout(row) for row in self.query(_ROLLOUT, group)]

    def grades(self, group: int) -> list[Grade]:
        """Every attempt at grading the group's responses, by sample, then attempt."""
        rows = self.query(_GRADE, group)
        return [Grade(g, s, a, v, bool(c), r, json.loads(p), d, t) for g, s, a, v, c, r, p, d, t in rows]

    # --- steps ----------------------------------------------------------------------------------------------------

    def plan(self, step: int) -> list[int] | None:
        """The groups of `step` in training order; None when it was not planned."""
        found = self.query("SELECT group_id FROM plan WHERE step = ? ORDER BY position", step)
        return [group for (group,) in found] or None

    def planned(self) -> list[tuple[int, list[int]]]:
        """Steps that are planned and not committed, with their groups."""
        found = self.query(
            "SELECT step, group_id FROM plan WHERE step > (SELECT coalesce(max(step), 0) FROM steps) ORDER BY step, position"
        )
        return [(step, [group for _, group in rows]) for step, rows in groupby(found, key=itemgetter(0))]

    def step(self, step: int) -> StepRow | None:
        """A committed step; None before its commit."""
        found = self.query("SELECT * FROM steps WHERE step = ?", step)
        return _step(found[0]) if found else None

    def steps(self) -> Iterator[StepRow]:
        """Committed steps, in order."""
        last = 0
        while page := self.query(f"SELECT * FROM steps WHERE step > ? ORDER BY step LIMIT {PAGE_ROWS}", last):
            last = page[-1][0]
            yield from map(_step, page)

    def config(self, config_id: str) -> dict[str, Any]:
        """A config that the run has had: `StepRow.config_id` names that of a step."""
        found = self.query("SELECT config FROM configs WHERE id = ?", config_id)
        if not found:
            raise LogError(f"{self.path}: config {config_id} is not in the log")
        return dict(json.loads(found[0][0]))

    def last_step(self) -> int:
        """The last committed step; 0 before the first."""
        return int(self.query("SELECT coalesce(max(step), 0) FROM steps")[0][0])

    def evaluation(self, step: int) -> dict[str, float] | None:
        """Figures of the evaluation of the weights after `step` steps, over what is graded; None when nothing is."""
        return next((figures for _, figures in self._evaluations("AND g.min_version = ?", step)), None)

    def evaluations(self) -> list[dict[str, float]]:
        """Figures of every evaluation that is complete, with its `eval_step`."""
        complete = """AND NOT EXISTS (SELECT 1 FROM groups AS w WHERE w.kind = 'eval'
            AND w.min_version = g.min_version AND w.status = 'waiting')"""
        return [{"eval_step": step, **figures} for step, figures in self._evaluations(complete)]

    # --- training data --------------------------------------------------------------------------------------------

    def sizes(self, groups: Sequence[int]) -> list[GroupSize]:
        """Token counts of these groups as `batch` would give them, in the same order, without reading the tokens."""
        found = self.query(
            "SELECT g.id, g.prompt_tokens FROM json_each(?) AS j JOIN groups AS g ON g.id = j.value ORDER BY j.key",
            json.dumps(list(groups)),
        )
        self._all_there(groups, [group for group, _ in found])
        lengths: list[list[int]] = [[] for _ in groups]
        for place, length in self.query(_SIZES, json.dumps(list(groups))):
            lengths[place].append(length)
        return [GroupSize(group, prompt, own) for (group, prompt), own in zip(found, lengths, strict=True)]

    def batch(self, step: int, groups: Sequence[int]) -> Batch:
        """These groups as columns, in the order asked for; responses in sample order, those that were not graded left out."""
        names = json.dumps(list(groups))
        prompts = self.query(
            "SELECT p.group_id, p.tokens FROM json_each(?) AS j JOIN prompts AS p ON p.group_id = j.value ORDER BY j.key",
            names,
        )
        self._all_there(groups, [group for group, _ in prompts])
        rows = sorted(self.query(_BATCH, names), key=itemgetter(0, 1))
        places, _, lengths, versions, tokens, logprobs, truncated, rewards, correct = (
            zip(*rows, strict=True) if rows else ((),) * 9
        )
        try:
            runs = [run for text in versions for run in json.loads(text)]
            values, counts = zip(*runs, strict=True) if runs else ((), ())
            return Batch(
                step=step,
                groups=np.array(groups, INT),
                prompt_lengths=np.array([len(blob) // INT.itemsize for _, blob in prompts], INT),
                prompts=np.frombuffer(b"".join(blob for _, blob in prompts), INT),
                sizes=np.bincount(np.array(places, INT), minlength=len(groups)).astype(INT),
                lengths=np.array(lengths, INT),
                tokens=np.frombuffer(b"".join(tokens), INT),
                logprobs=np.frombuffer(b"".join(logprobs), FLOAT),
                versions=np.repeat(np.array(values, INT), np.array(counts, np.int64)),
                rewards=np.array(rewards, FLOAT),
                correct=np.array(correct, BOOL),
                truncated=np.array(truncated, BOOL),
            )
        except (ValueError, TypeError) as error:
            raise LogError(f"{self.path}: groups of step {step} are damaged: {error}") from error

    # --- how rows are read ----------------------------------------------------------------------------------------

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of one statement, in one short read transaction. Raises `LogError`."""
        try:
            with closing(self._connection.execute(sql, values)) as cursor:
                return cursor.fetchall()
        except sqlite3.Error as error:
            raise LogError(f"{self.path}: cannot be read: {error}; expected an undamaged log") from error

    def _pages(self, where: str, *values: object) -> Iterator[GroupRow]:
        last = -1
        after = f"?{len(values) + 1}"
        sql = f"{_GROUP} WHERE {where} AND g.id > {after} ORDER BY g.id LIMIT {PAGE_ROWS}"
        while page := self.query(sql, *values, last):
            last = page[-1][0]
            yield from map(self._group, page)

    def _evaluations(self, where: str, *values: object) -> Iterator[tuple[int, dict[str, float]]]:
        names = ("accuracy", "reward_mean", "length_mean", "prompts", "samples", "seconds")
        for step, *figures in self.query(f"{_EVALUATION} {where} GROUP BY g.min_version", *values):
            if figures[0] is not None:
                yield step, dict(zip(names, map(float, figures), strict=True))

    def _group(self, row: tuple[Any, ...]) -> GroupRow:
        values = list(row)
        values[5] = np.frombuffer(row[5], INT)
        return GroupRow(*values)

    def _rollout(self, row: tuple[Any, ...]) -> Rollout:
        group, sample, fence, tokens, logprobs, versions, *rest = row
        try:
            runs = msgspec.json.decode(versions, type=list[tuple[int, int]])
            return Rollout(
                group, sample, fence, np.frombuffer(tokens, INT), np.frombuffer(logprobs, FLOAT), runs, *rest
            )
        except ValueError as error:
            raise LogError(f"{self.path}: group {group} sample {sample} is damaged: {error}") from error

    def _all_there(self, asked: Sequence[int], found: Sequence[int]) -> None:
        if list(asked) != list(found):
            missing = sorted(set(asked) - set(found))
            raise LogError(
                f"{self.path}: groups {missing[:10]} are not in the log ({len(missing)} of {len(asked)} asked)"
            )


def _step(row: tuple[Any, ...]) -> StepRow:
    metrics = {name: math.nan if value is None else value for name, value in json.loads(row[-1]).items()}
    values = [*row[:-2], json.loads(row[-2]), metrics]
    return StepRow(*values)
