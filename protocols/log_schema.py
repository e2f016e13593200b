"""The log's file: its schema, how it is made and opened, and what is refused.

`runs/NAME/rollouts.db` is a plain SQLite database in WAL mode. Anybody may read it with `sqlite3` while the run goes
on; only the buffer writes. `PRAGMA application_id` is 0x48656164 ("Head"), `PRAGMA user_version` the schema version.

    meta          key, value: run, config (JSON), code_version, created_at; start and critic (JSON: the models that
                  step 1 starts from), origin (JSON: the log that this one was made from)
    groups        one prompt and its samples: kind (train, eval, ready), status (waiting, trained, dropped, failed,
                  evaluated) with reason and step, task, prompt_id, samples, prompt_tokens, min_version, issued_at
    prompts       what never changes of a group: its text, token ids and answer (JSON)
    rollouts      one response: worker, finish (stop, length), response_tokens, version_min and version_max of the
                  weights that sampled it, times, text, token ids and log-probabilities
    grades        every attempt at scoring a response: verdict (graded, timeout, crash, infra), correct, reward, parts
    final_grades  (view) the attempt that counts: the last graded one, else the last failure
    samples       (view) one row a response with its group and its final grade: the table to start from
    plan          which groups make which step, in training order; a group is in one step at most
    steps         committed training steps: weights_hash, fingerprints (JSON: of each weight), code_version, config_id,
                  metrics (JSON), times
    configs       every config that the run has had, by id
    events        who joined and left, what was refused

Times are Unix seconds. `tokens` are int32 and `logprobs` float32, little endian; `versions` is JSON, runs of
[weights version, token count]. For instance, the accuracy of every step's groups:

    SELECT step, avg(correct), avg(response_tokens) FROM samples WHERE group_status = 'trained' GROUP BY step;
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

SCHEMA = 2
"""Version of the tables below. A log of another version is refused, never converted."""

APPLICATION = 0x48656164
PAGE_BYTES = 16384
"""Measured best of 4, 16, 32 and 64 KiB for responses of 500 to 8000 tokens."""
WAL_BYTES = 64 << 20
"""The write-ahead log is copied into the database whenever it exceeds this."""
BUSY_S = 30.0

DDL = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE groups (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('train', 'eval', 'ready')),
    status TEXT NOT NULL DEFAULT 'waiting' CHECK (status IN ('waiting', 'trained', 'dropped', 'failed', 'evaluated')),
    reason TEXT,                        -- why it was dropped or failed
    step INTEGER,                       -- the step that trained it
    task TEXT NOT NULL,
    prompt_id TEXT NOT NULL,
    source_index INTEGER NOT NULL,      -- its place in the endless stream of prompts
    samples INTEGER NOT NULL,           -- how many responses it gets
    seed INTEGER NOT NULL,
    min_version INTEGER NOT NULL,       -- no older weights start it; for an evaluation, the step that is evaluated
    prompt_tokens INTEGER NOT NULL,
    issued_at REAL NOT NULL
);
CREATE INDEX groups_waiting ON groups (id) WHERE status = 'waiting';
CREATE INDEX groups_source ON groups (kind, source_index);
CREATE INDEX groups_evaluated ON groups (min_version) WHERE kind = 'eval';
CREATE TABLE prompts (
    group_id INTEGER PRIMARY KEY REFERENCES groups,
    answer TEXT NOT NULL,               -- the data row's answer, JSON
    text TEXT NOT NULL,
    tokens BLOB NOT NULL                -- int32
);
CREATE TABLE rollouts (
    id INTEGER PRIMARY KEY,             -- order of arrival
    group_id INTEGER NOT NULL REFERENCES groups,
    sample INTEGER NOT NULL,            -- 0 to samples - 1
    fence INTEGER NOT NULL,             -- of the ticket under which it was made
    worker TEXT NOT NULL,
    finish TEXT NOT NULL CHECK (finish IN ('stop', 'length')),
    response_tokens INTEGER NOT NULL,
    version_min INTEGER NOT NULL,
    version_max INTEGER NOT NULL,
    started_at REAL NOT NULL,
    finished_at REAL NOT NULL,
    received_at REAL NOT NULL,
    versions TEXT NOT NULL,             -- JSON: [[weights version, token count], ...]
    text TEXT NOT NULL,
    tokens BLOB NOT NULL,               -- int32
    logprobs BLOB NOT NULL,             -- float32, of the weights that sampled each token
    UNIQUE (group_id, sample),
    CHECK (length(tokens) = 4 * response_tokens AND length(logprobs) = 4 * response_tokens)
);
CREATE TABLE grades (
    group_id INTEGER NOT NULL,
    sample INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('graded', 'timeout', 'crash', 'infra')),
    correct INTEGER NOT NULL,           -- raw accuracy, 0 or 1
    reward REAL NOT NULL,               -- what is trained on (shaped)
    parts TEXT NOT NULL,                -- JSON: how the reward came about
    detail TEXT NOT NULL,
    seconds REAL NOT NULL,
    worker TEXT NOT NULL,
    received_at REAL NOT NULL,
    PRIMARY KEY (group_id, sample, attempt),
    FOREIGN KEY (group_id, sample) REFERENCES rollouts (group_id, sample)
) WITHOUT ROWID;
CREATE TABLE plan (
    step INTEGER NOT NULL,
    position INTEGER NOT NULL,
    group_id INTEGER NOT NULL UNIQUE REFERENCES groups,
    PRIMARY KEY (step, position)
) WITHOUT ROWID;
CREATE TABLE steps (
    step INTEGER PRIMARY KEY,
    weights_hash TEXT NOT NULL,
    code_version TEXT NOT NULL,
    started_at REAL NOT NULL,
    finished_at REAL NOT NULL,
    committed_at REAL NOT NULL,
    config_id TEXT NOT NULL REFERENCES configs,
    fingerprints TEXT NOT NULL,         -- JSON: {weight: fingerprint} after the step
    metrics TEXT NOT NULL               -- JSON
);
CREATE TABLE configs (id TEXT PRIMARY KEY, config TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    worker TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE VIEW final_grades AS
    SELECT * FROM grades AS a WHERE NOT EXISTS (
        SELECT 1 FROM grades AS b WHERE b.group_id = a.group_id AND b.sample = a.sample
        AND (b.verdict = 'graded', b.attempt) > (a.verdict = 'graded', a.attempt));
CREATE VIEW samples AS
    SELECT r.id AS rollout_id, r.group_id, r.sample, g.kind, g.prompt_id, g.task, g.status AS group_status, g.reason,
        g.step, CASE f.verdict WHEN 'graded' THEN f.reward END AS reward,
        CASE f.verdict WHEN 'graded' THEN f.correct END AS correct, f.verdict, f.parts, r.finish, g.prompt_tokens,
        r.response_tokens, r.version_min, r.version_max, r.worker, r.started_at, r.finished_at,
        p.text AS prompt_text, r.text AS response_text
    FROM rollouts AS r JOIN groups AS g ON g.id = r.group_id JOIN prompts AS p ON p.group_id = r.group_id
        LEFT JOIN final_grades AS f ON f.group_id = r.group_id AND f.sample = r.sample;
"""


class LogError(RuntimeError):
    """The log cannot be made, read or written; names the file, what was found and what was expected."""


class AlreadyLogged(LogError):
    """The row is in the log already; nothing was changed, and the transaction goes on."""


def lock_writer(path: Path) -> BinaryIO:
    """The lock file of the one writer, locked until it is closed or this process ends. Raises `LogError` when taken."""
    file = path.with_name(path.name + ".writer").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise LogError(f"{path}: another process writes this log, or replays it; expected one writer") from error
    return file


def hold_still(path: Path) -> tuple[bool, BinaryIO | None]:
    """Whether nobody writes a log and all of it is in the database, so that it can be read without files beside it; and
    the lock file that keeps writers away until it is closed."""
    lock, wal = path.with_name(path.name + ".writer"), path.with_name(path.name + "-wal")
    file: BinaryIO | None = None
    try:
        if lock.is_file():  # a log that was copied without it has no writer
            file = lock.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not wal.exists() or wal.stat().st_size == 0:
            return True, file
    except OSError:
        pass
    if file is not None:
        file.close()
    return False, None


def make(path: Path, meta: dict[str, str]) -> None:
    """An empty log at `path`, whole or not at all. Raises `LogError` when something is there or cannot be written."""
    if path.exists():
        raise LogError(f"{path}: exists already; expected a new file")
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    try:
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(
                f"BEGIN; PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; {DDL} COMMIT;"
            )
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LogError(f"{path}: cannot be made: {error}") from error
    temporary.replace(path)
    _sync_folder(path.parent)


def connect(path: Path, *, write: bool, still: bool = False) -> sqlite3.Connection:
    """An open log, checked before anything is written. `still`: nobody will write it meanwhile, so that SQLite needs no
    files beside it. Raises `LogError` for what is no log of this schema."""
    if not path.is_file():
        raise LogError(f"{path}: no such log; expected the rollouts.db of a run")
    reader = _open(path, "mode=ro&immutable=1" if still else "mode=ro")
    try:
        _check(path, reader)
    except BaseException:
        reader.close()
        raise
    if not write:
        reader.execute("PRAGMA query_only = ON")
        return reader
    reader.close()
    writer = _open(path, "mode=rw")
    for pragma in (
        "synchronous = FULL",
        "foreign_keys = ON",
        "cache_size = -32768",
        f"wal_autocheckpoint = {WAL_BYTES // PAGE_BYTES}",
        f"journal_size_limit = {WAL_BYTES}",
    ):
        writer.execute(f"PRAGMA {pragma}")
    return writer


def uri(path: Path, how: str) -> str:
    """The address of a database for SQLite."""
    return f"file:{quote(str(path.resolve()))}?{how}"


def _open(path: Path, how: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(uri(path, how), uri=True, isolation_level=None, timeout=BUSY_S)
    except sqlite3.Error as error:
        raise LogError(f"{path}: cannot be opened: {error}") from error


def _check(path: Path, connection: sqlite3.Connection) -> None:
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        schema = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.Error as error:
        raise LogError(f"{path}: cannot be read: {error}; expected an undamaged SQLite database") from error
    if application != APPLICATION or not tables:
        raise LogError(f"{path}: not a Headrace log: got application id {application:#x}, expected {APPLICATION:#x}")
    if schema != SCHEMA:
        raise LogError(
            f"{path}: got schema version {schema}, expected {SCHEMA}: read it with the Headrace that wrote it"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
