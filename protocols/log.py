"""The durable log of a run: every rollout, grade and training step is a row. `log_schema` documents the tables.

One process writes (the buffer), any number read meanwhile. Writes collect in one transaction; `commit()` makes them
durable, and only then may anything that depends on them be acknowledged.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any, BinaryIO, Self

import msgspec
import numpy as np
import xxhash

from protocols.log_read import LogReader
from protocols.log_rows import Event, GroupRow, Kind, Meta, OpenGroup, Origin, SampleState, Start, Status, StepRow
from protocols.log_schema import SCHEMA, AlreadyLogged, LogError, connect, hold_still, lock_writer, make
from protocols.messages import FLOAT, INT, Grade, Rollout, StepCommit

__all__ = [
    "SCHEMA", "AlreadyLogged", "Event", "GroupRow", "Kind", "Log", "LogError", "LogReader", "Meta", "OpenGroup",
    "Origin", "SampleState", "Start", "Status", "StepRow",
]  # fmt: skip


class Log(LogReader):
    """A log, opened to read or, with `write`, to append. Not for use from several threads at once."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, lock: BinaryIO | None, *, still: bool = False
    ) -> None:
        super().__init__(path, connection)
        self._lock, self.still = lock, still

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        run: str,
        config: dict[str, Any],
        code_version: str,
        start: Start | None = None,
        critic: Start | None = None,
        origin: Origin | None = None,
    ) -> Self:
        """A new log, open for writing. Raises `LogError` when the file exists or cannot be made."""
        path = Path(path)
        meta = {"run": run, "code_version": code_version, "created_at": repr(time.time())}
        facts = {"config": config, "start": start, "critic": critic, "origin": origin}
        meta |= {key: msgspec.json.encode(fact).decode() for key, fact in facts.items() if fact is not None}
        try:
            lock = lock_writer(path)
            try:
                make(path, meta)
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise LogError(f"{path}: cannot be made: {error.strerror}") from error
        return cls(path, connect(path, write=True), lock)

    @classmethod
    def open(cls, path: str | Path, *, write: bool = False) -> Self:
        """An existing log. Raises `LogError`: none there, damaged, of another schema, or another writer has it."""
        path = Path(path)
        if not write:
            return cls(path, connect(path, write=False), None)
        connect(path, write=False).close()
        lock = lock_writer(path)
        try:
            return cls(path, connect(path, write=True), lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open_still(cls, path: str | Path) -> Self:
        """An existing log to read, whose folder stays as it is: where nobody writes it, nobody can until this is closed.
        Raises `LogError`."""
        path = Path(path)
        still, lock = hold_still(path)
        try:
            return cls(path, connect(path, write=False, still=still), lock, still=still)
        except BaseException:
            if lock is not None:
                lock.close()
            raise

    def close(self) -> None:
        """Releases the file. What was not committed is gone."""
        if self._lock is not None and self._connection.in_transaction:
            self._connection.rollback()
        super().close()
        if self._lock is not None:
            self._lock.close()

    # --- writing --------------------------------------------------------------------------------------------------

    def add_group(self, row: GroupRow) -> None:
        """A prompt is issued."""
        what = f"group {row.group}"
        self._write(
            """INSERT INTO groups (id, kind, status, reason, step, task, prompt_id, source_index, samples, seed,
            min_version, prompt_tokens, issued_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                row.group, row.kind, row.status, row.reason, row.step, row.task, row.prompt_id, row.source_index,
                row.samples, row.seed, row.min_version, row.prompt.shape[0], row.issued_at,
            ),
            what,
        )  # fmt: skip
        prompt = _raw(row.prompt, INT)
        self._write("INSERT INTO prompts VALUES (?, ?, ?, ?)", (row.group, row.answer, row.prompt_text, prompt), what)

    def add_rollout(self, worker: str, rollout: Rollout, received_at: float) -> None:
        """A response has arrived. Raises `AlreadyLogged` for a second one of the same sample."""
        versions = [version for version, _ in rollout.versions]
        self._write(
            """INSERT INTO rollouts (group_id, sample, fence, worker, finish, response_tokens, version_min, version_max,
            started_at, finished_at, received_at, versions, text, tokens, logprobs)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)""",
            (
                rollout.group, rollout.sample, rollout.fence, worker, rollout.finish, rollout.tokens.shape[0],
                min(versions), max(versions), rollout.started_at, rollout.finished_at, received_at,
                msgspec.json.encode(rollout.versions).decode(), rollout.text,
                _raw(rollout.tokens, INT), _raw(rollout.logprobs, FLOAT),
            ),
            f"the response of group {rollout.group} sample {rollout.sample}",
        )  # fmt: skip

    def add_grade(self, worker: str, grade: Grade, received_at: float) -> None:
        """One attempt at grading has ended. Raises `AlreadyLogged` for a second verdict on the same attempt."""
        self._write(
            "INSERT INTO grades VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                grade.group, grade.sample, grade.attempt, grade.verdict, grade.correct, grade.reward,
                msgspec.json.encode(grade.parts).decode(), grade.detail, grade.seconds, worker, received_at,
            ),
            f"the grade of group {grade.group} sample {grade.sample} attempt {grade.attempt}",
        )  # fmt: skip

    def set_group(self, group: int, status: Status, *, reason: str | None = None, step: int | None = None) -> None:
        """What became of a group. Saying the same again is allowed; changing what was said raises `LogError`."""
        changed = self._write(
            "UPDATE groups SET status = ?1, reason = ?2, step = ?3 WHERE id = ?4 AND (status = 'waiting' OR status = ?1)",
            (status, reason, step, group),
            f"group {group}",
        )
        if not changed:
            found = self.query("SELECT status FROM groups WHERE id = ?", group)
            got = f"it is {found[0][0]}" if found else "it is not in the log"
            raise LogError(f"{self.path}: group {group} cannot become {status}: {got}, expected a waiting group")

    def set_config(self, config: dict[str, Any]) -> None:
        """The settings that the run goes on with from now."""
        encoded = msgspec.json.encode(config).decode()
        self._write("UPDATE meta SET value = ? WHERE key = 'config'", (encoded,), "the config")

    def add_plan(self, step: int, groups: list[int]) -> None:
        """These groups make `step`, in this order. Raises `AlreadyLogged` when one of them is in a plan."""
        for position, group in enumerate(groups):
            what = f"the plan of step {step} with group {group}"
            self._write("INSERT INTO plan VALUES (?, ?, ?)", (step, position, group), what)

    def commit_step(self, commit: StepCommit, *, empty: bool = False) -> None:
        """A step is trained, and so are the groups of its plan (`empty`: it has none). Raises `LogError` for a step out of
        turn or not planned."""
        step, expected = commit.step, self.last_step() + 1
        if step < expected:
            raise AlreadyLogged(f"{self.path}: step {step} is committed already; expected step {expected}")
        if step > expected or (self.plan(step) is None) != empty:
            raise LogError(
                f"{self.path}: got the commit of step {step}, expected step {expected} and that it is planned"
            )
        config = str(self.query("SELECT value FROM meta WHERE key = 'config'")[0][0])
        config_id = xxhash.xxh3_64_hexdigest(config.encode())
        self._write("INSERT OR IGNORE INTO configs VALUES (?, ?)", (config_id, config), f"the config of step {step}")
        self._write(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                step, commit.weights_hash, commit.code_version, commit.started_at, commit.finished_at, time.time(), config_id,
                msgspec.json.encode(commit.fingerprints).decode(), msgspec.json.encode(commit.metrics).decode(),
            ),
            f"step {step}",
        )  # fmt: skip
        trained = (
            "UPDATE groups SET status = 'trained', step = ?1 WHERE id IN (SELECT group_id FROM plan WHERE step = ?1)"
        )
        self._write(trained, (step,), f"step {step}")

    def add_event(self, kind: str, worker: str, detail: str, at: float) -> None:
        """Something worth remembering happened to the run."""
        row = (at, kind, worker, detail)
        self._write("INSERT INTO events (at, kind, worker, detail) VALUES (?, ?, ?, ?)", row, "an event")

    def commit(self) -> None:
        """Makes everything written so far durable. Raises `LogError` when the disk refuses; all since the last commit is undone."""
        if self._connection.in_transaction:
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._undone(error, "commit") from error

    def undo(self) -> None:
        """Forgets everything since the last commit."""
        if self._connection.in_transaction:
            self._connection.rollback()

    def _write(self, sql: str, values: tuple[object, ...], what: str) -> int:
        try:
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN IMMEDIATE")
            return self._connection.execute(sql, values).rowcount
        except sqlite3.IntegrityError as error:
            raise self._refused(error, what) from error
        except sqlite3.Error as error:
            raise self._undone(error, what) from error

    def _refused(self, error: sqlite3.IntegrityError, what: str) -> LogError:
        """A constraint stopped one statement; the transaction goes on without it."""
        match error.sqlite_errorname:
            case "SQLITE_CONSTRAINT_PRIMARYKEY" | "SQLITE_CONSTRAINT_UNIQUE" | "SQLITE_CONSTRAINT_ROWID":
                return AlreadyLogged(f"{self.path}: {what} is in the log already ({error})")
            case "SQLITE_CONSTRAINT_FOREIGNKEY":
                return LogError(f"{self.path}: {what}: the group or response it belongs to is not in the log")
            case _:
                return LogError(f"{self.path}: {what} is refused: {error}")

    def _undone(self, error: sqlite3.Error, what: str) -> LogError:
        if self._connection.in_transaction:
            self._connection.rollback()
        return LogError(
            f"{self.path}: writing {what} failed: {error}; nothing since the last commit is kept. Is the disk full?"
        )


def _raw(array: np.ndarray, dtype: np.dtype) -> memoryview | bytes:
    return np.ascontiguousarray(array, dtype).data.cast("B") if array.size else b""
