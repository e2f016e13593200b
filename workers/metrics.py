"""The run's figures on disk: `metrics.jsonl`, one line a step or an evaluation, and the same in TensorBoard.

The lines are the truth, the event files a view of them: whatever is missing there when a run is continued is added,
and nothing is ever written twice. Lines look like

    {"step": 12, "time": 1760000000.0, "loss": 0.01, "accuracy": 0.4, ...}
    {"eval_step": 10, "time": 1760000000.0, "accuracy": 0.35, "prompts": 256, ...}
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

FILE = "metrics.jsonl"
EVENTS = "tensorboard"
KEYS = ("step", "eval_step")
TAGS = {"step": "train", "eval_step": "eval"}


class MetricsError(ValueError):
    """A line of `metrics.jsonl` that is no figure of a step or an evaluation; names the file and the line."""


class History(Struct, frozen=True):
    """What `metrics.jsonl` holds, each in the order of steps; numbers that were not finite are None."""

    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]


def read_metrics(run_dir: Path) -> History:
    """The run's figures so far; empty when there are none. A line that is not whole yet is left out. Raises
    `MetricsError`."""
    rows = _read_rows(run_dir / FILE)[0]
    return History(*(sorted((row for row in rows if key in row), key=lambda row: int(row[key])) for key in KEYS))


class MetricsWriter:
    """Appends to a run's figures; opening it for a run that goes on continues where the file stands, and raises
    `MetricsError` when the file is damaged."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE
        rows, whole = _read_rows(path)
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)
        self._written = {(key, int(row[key])) for row in rows for key in KEYS if key in row}
        self._lines = path.open("a", encoding="utf-8")
        self._events = _EventFile(run_dir / EVENTS)
        for row in rows:
            self._events.add(row)

    def step(self, step: int, metrics: Mapping[str, float], *, at: float | None = None) -> bool:
        """Writes the figures of a training step; False when the file has that step already (then nothing is done)."""
        return self._write("step", step, metrics, at)

    def evaluation(self, step: int, metrics: Mapping[str, float], *, at: float | None = None) -> bool:
        """Writes an evaluation of the weights after `step` steps; False when the file has it already."""
        return self._write("eval_step", step, metrics, at)

    def missing(self, key: str, steps: Iterable[int]) -> list[int]:
        """Those of `steps` that have no line with `key` ("step" or "eval_step")."""
        return [step for step in steps if (key, step) not in self._written]

    def close(self) -> None:
        self._lines.close()
        self._events.close()

    def _write(self, key: str, step: int, metrics: Mapping[str, float], at: float | None) -> bool:
        if (key, step) in self._written:
            return False
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        row = {key: step, "time": time.time() if at is None else at, **values}
        self._lines.write(json.dumps(row) + "\n")
        self._lines.flush()
        self._written.add((key, step))
        self._events.add(row)
        return True


class _EventFile:
    """A new TensorBoard event file beside those of earlier processes; it repeats none of their rows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._known = {_identity(event) for path in sorted(folder.glob("*tfevents*")) for event in read_events(path)}
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._put(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, row: Mapping[str, Any]) -> None:
        key = next(key for key in KEYS if key in row)
        if (TAGS[key], row[key]) in self._known:
            return
        values = [
            Summary.Value(tag=f"{TAGS[key]}/{name}", simple_value=value)
            for name, value in row.items()
            if name not in (*KEYS, "time") and isinstance(value, int | float)
        ]
        self._put(Event(wall_time=row["time"], step=row[key], summary=Summary(value=values)))
        self._known.add((TAGS[key], row[key]))

    def close(self) -> None:
        self._file.close()

    def _put(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def read_events(path: Path) -> Iterator[Event]:
    """The whole records of a TensorBoard event file, checksums not looked at; a cut one ends it."""
    with path.open("rb") as file:
        while len(header := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", header[:8])
            record = file.read(length + 4)
            if len(record) < length + 4:
                return
            yield Event.FromString(record[:length])


def _identity(event: Event) -> tuple[str, int]:
    tag = event.summary.value[0].tag if event.summary.value else ""
    return tag.partition("/")[0], event.step


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of the whole lines, and how many bytes those lines take. Raises `MetricsError`."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise MetricsError(f"{path}, line {number}: not JSON ({error}), expected one object a line") from error
        if not isinstance(row, dict) or not any(isinstance(row.get(key), int) for key in KEYS):
            raise MetricsError(f"{path}, line {number}: got {row!r:.80}, expected an object with step or eval_step")
        rows.append(row)
    return rows, whole
