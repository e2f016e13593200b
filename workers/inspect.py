"""`headrace show` and `headrace export`: a run read from its log, also while it goes on.

An export has one row a response, as Parquet or JSON lines; its columns are those of the log's view `samples`.
`group_status` is trained, dropped, waiting or failed; evaluation groups (`kind` "eval"), which training never sees,
count as dropped with the reason "evaluation". `reward` and `correct` are null until a response is graded, and for good
when grading it failed. `parts` is an object in JSON lines and its JSON text in Parquet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from protocols.log import Log, LogError, LogReader
from workers.show import InspectError, show_group, show_run, show_step

__all__ = ["InspectError", "export", "open_run", "show"]

PAGE_ROWS = 1024
"""Rows in memory at once, and in one row group."""

SCHEMA = pa.schema(
    [
        ("group", pa.int64()), ("sample", pa.int32()), ("kind", pa.string()), ("prompt_id", pa.string()),
        ("task", pa.string()), ("group_status", pa.string()), ("reason", pa.string()), ("step", pa.int64()),
        ("reward", pa.float64()), ("correct", pa.bool_()), ("verdict", pa.string()), ("parts", pa.string()),
        ("finish", pa.string()), ("prompt_tokens", pa.int32()), ("response_tokens", pa.int32()),
        ("version_min", pa.int64()), ("version_max", pa.int64()), ("worker", pa.string()),
        ("started_at", pa.float64()), ("finished_at", pa.float64()), ("prompt_text", pa.string()),
        ("response_text", pa.string()),
    ]
)  # fmt: skip


def open_run(run: str | Path) -> Log:
    """The log of a run, given as its folder, its name under `runs/`, or the log itself. Raises `InspectError`."""
    places = [Path(run), Path("runs") / run]
    files = [place if place.suffix == ".db" else place / "rollouts.db" for place in places]
    for file in files:
        if file.is_file():
            try:
                return Log.open(file)
            except LogError as error:
                raise InspectError(str(error)) from error
    raise InspectError(f"{run}: no such run: looked for {' and '.join(map(str, files))}")


def show(run: str | Path, *, group: int | None = None, step: int | None = None, console: Console | None = None) -> None:
    """Prints a group, a step, or, with neither, the run. Raises `InspectError` for what is not there."""
    console = console or Console(highlight=False, soft_wrap=True)
    if group is not None and step is not None:
        raise InspectError(f"got group {group} and step {step}, expected one of them")
    with open_run(run) as log:
        if group is not None:
            show_group(log, group, console)
        elif step is not None:
            show_step(log, step, console)
        else:
            show_run(log, console)


def export(run: str | Path, out: str | Path) -> int:
    """Writes every response of a run to `out`, whole or not at all; returns how many. Raises `InspectError`."""
    out = Path(out)
    writers = {".parquet": _write_parquet, ".jsonl": _write_jsonl}
    if out.suffix not in writers:
        raise InspectError(f"{out}: got the suffix {out.suffix!r}, expected {' or '.join(writers)}")
    temporary = out.with_name(f".{out.name}.part")
    with open_run(run) as log:
        try:
            count = writers[out.suffix](temporary, _pages(log))
            temporary.replace(out)
        except OSError as error:
            raise InspectError(f"{out}: cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return count


def _pages(log: LogReader) -> Iterator[list[dict[str, Any]]]:
    """The responses that are there now, by pages: a run that goes on does not make the export endless."""
    names = ", ".join("group_id" if name == "group" else name for name in SCHEMA.names)
    sql = (
        f"SELECT rollout_id, {names} FROM samples WHERE rollout_id > ? AND rollout_id <= ? ORDER BY rollout_id LIMIT ?"
    )
    after, last = 0, log.query("SELECT coalesce(max(id), 0) FROM rollouts")[0][0]
    while rows := log.query(sql, after, last, PAGE_ROWS):
        after = rows[-1][0]
        yield [_row(dict(zip(SCHEMA.names, row[1:], strict=True))) for row in rows]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    if row["group_status"] == "evaluated":
        row |= {"group_status": "dropped", "reason": "evaluation"}
    if row["correct"] is not None:
        row["correct"] = bool(row["correct"])
    return row


def _write_parquet(path: Path, pages: Iterator[list[dict[str, Any]]]) -> int:
    count = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for rows in pages:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            count += len(rows)
    return count


def _write_jsonl(path: Path, pages: Iterator[list[dict[str, Any]]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for rows in pages:
            for row in rows:
                row["parts"] = json.loads(row["parts"]) if row["parts"] is not None else None
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += len(rows)
    return count
