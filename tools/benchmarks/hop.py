"""The rollout hop: groups of 16 responses from a producer over the buffer to torch tensors in a consumer, in tokens per
second and per CPU second, against TransferQueue's put, get and clear of the same tensors.

Three processes of ours (`hop_headrace.py`: the link, the log, every commit on disk before it is acknowledged) and four of
TransferQueue beside Ray's own (`hop_transferqueue.py`: producer, consumer, controller, one storage unit, in memory), in
turns. A chunk of one group, and of 16 ("batched"): with us the producer sends single responses either way, and the
consumer pulls chunks; TransferQueue also puts chunks. Lengths vary by half around the mean, as responses do; with
`--equal` they do not, and TransferQueue takes dense tensors, which is its faster way.

CPU seconds are user and system time of every process of a side (psutil): ours three, and all in TransferQueue's
namespace, Ray's services with them. The system's own work for the disk counts for nobody.

    python -m tools.benchmarks.hop --repeats 5 --json hop.json
    python -m tools.benchmarks.hop --soak 2             # only ours: does the buffer's memory stay flat?
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tools.benchmarks.hop_headrace import HeadraceHop
from tools.benchmarks.hop_rounds import AHEAD, Round
from tools.benchmarks.hop_transferqueue import TransferQueueHop, unavailable

SIZES = {512: 512, 2304: 256, 8448: 128}
"""Mean response length: groups of a round (4 to 17 million tokens)."""
CHUNKS = (1, 16)
WARM_UP = 1
SOAK_TOKENS, SOAK_GROUPS, SOAK_PAUSE_S = 2304, AHEAD, 1.0
"""A soak is paced, 1.2 million tokens and a pause: else it would fill the disk. It starts to count after a fifth."""

Hop = HeadraceHop | TransferQueueHop
Row = dict[str, float | str | bool]


def run(folder: Path, *, repeats: int, ragged: bool) -> list[Row]:
    """One row a length and chunk. Without TransferQueue the rows say why, and hold only our figures."""
    missing = unavailable()
    sides: list[Hop] = []
    rows: list[Row] = []
    first = 0
    try:
        sides.append(HeadraceHop(folder))
        if missing is None:
            sides.append(TransferQueueHop())
        for tokens, groups in SIZES.items():
            for chunk in CHUNKS:
                samples: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
                for repeat in range(WARM_UP + repeats):
                    round = Round(tokens, groups, chunk, first, ragged)
                    first += groups
                    for side in sides:
                        figures = measure(side, round)
                        if repeat >= WARM_UP:
                            samples[side.name].append(figures)
                rows.append(row(round, repeats, folder, samples, missing))
    finally:
        for side in sides:
            side.close()
    return rows


def measure(side: Hop, round: Round) -> tuple[float, float]:
    """Million tokens per second, and per CPU second."""
    side.ask("prepare", round)
    before = cpu_seconds(side.pids)
    seconds = side.ask("go", round)
    after = cpu_seconds(side.pids)
    side.ask("check", round)
    spent = sum(after[pid] - before.get(pid, 0.0) for pid in after)
    return round.all_tokens / seconds / 1e6, round.all_tokens / spent / 1e6


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    """User and system seconds of each process so far."""
    found = {}
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:  # an idle worker of Ray's that has ended
            continue
        found[pid] = times.user + times.system
    return found


def row(
    round: Round, repeats: int, folder: Path, samples: dict[str, list[tuple[float, float]]], missing: str | None
) -> Row:
    found: Row = {
        "tokens": round.tokens,
        "ragged": round.ragged,
        "groups": round.groups,
        "chunk": round.chunk,
        "repeats": repeats,
        "load": os.getloadavg()[0],
        "disk": filesystem(folder),
        "torch": version("torch"),
    }
    for side, figures in samples.items():
        for what, values in zip(("mtok_s", "mtok_cpu_s"), zip(*figures, strict=True), strict=True):
            name = f"{side.lower()}_{what}"
            found |= {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
    if missing is not None:
        return found | {"transferqueue": missing}
    ours, theirs = samples["Headrace"], samples["TransferQueue"]
    for at, what in enumerate(("speed_ratio", "cpu_ratio")):
        found[what] = statistics.median(a[at] / b[at] for a, b in zip(ours, theirs, strict=True))
    return found | {"transferqueue": version("TransferQueue"), "ray": version("ray")}


def filesystem(folder: Path) -> str:
    """The log's: on one in memory a commit costs nothing."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def soak(folder: Path, minutes: float) -> Row:
    """Our hop for so long, paced, and how the buffer's resident memory went, in MiB."""
    hop = HeadraceHop(folder)
    memory: list[float] = []
    tokens = first = 0
    try:
        process = psutil.Process(hop.buffer_pid)
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            round = Round(SOAK_TOKENS, SOAK_GROUPS, CHUNKS[-1], first)
            hop.ask("prepare", round)
            hop.ask("go", round)
            first, tokens = first + round.groups, tokens + round.all_tokens
            memory.append(process.memory_info().rss / 2**20)
            time.sleep(SOAK_PAUSE_S)
    finally:
        hop.close()
    settled = memory[len(memory) // 5 :]
    tenth = max(1, len(settled) // 10)
    start, end = statistics.median(settled[:tenth]), statistics.median(settled[-tenth:])
    return {
        "soak_minutes": minutes,
        "mtok": tokens / 1e6,
        "log_mib": sum(file.stat().st_size for file in folder.iterdir()) / 2**20,
        "rss_start_mib": start,
        "rss_end_mib": end,
        "rss_growth_mib": end - start,
        "rss_peak_mib": max(memory),
    }


def show(rows: list[Row]) -> None:
    table = Table(title="Producer to consumer's tensors: median (lowest-highest) in million tokens")
    for column in ("response", "at once", "per", "Headrace", "TransferQueue", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in rows:
        cells = [str(found["tokens"]), str(found["chunk"])]
        for per, what, ratio in (("s", "mtok_s", "speed_ratio"), ("CPU s", "mtok_cpu_s", "cpu_ratio")):
            figures = spread(found, f"headrace_{what}"), spread(found, f"transferqueue_{what}")
            table.add_row(*cells, per, *figures, f"{float(found[ratio]):.2f}" if ratio in found else "")
            cells = ["", ""]
    Console().print(table)


def spread(found: Row, name: str) -> str:
    if name not in found:
        return ""
    middle, low, high = (float(found[name + end]) for end in ("", "_low", "_high"))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    equal: Annotated[bool, typer.Option("--equal", help="All responses of the same length.")] = False,
    soak_minutes: Annotated[float, typer.Option("--soak", help="Run ours for so many minutes instead.")] = 0.0,
    folder: Annotated[Path, typer.Option(help="The log is made below; not on a file system in memory.")] = Path(),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare the way of a rollout, to disk and to the learner's tensors, with TransferQueue's in memory."""
    with tempfile.TemporaryDirectory(prefix="hop-", dir=folder) as below:
        if soak_minutes > 0:
            found = soak(Path(below), soak_minutes)
            rows = [found]
            Console().print(
                f"buffer: {found['mtok']:.0f} million tokens in {soak_minutes:g} min, log {found['log_mib']:.0f} MiB; memory "
                f"{found['rss_start_mib']:.1f} to {found['rss_end_mib']:.1f} MiB, peak {found['rss_peak_mib']:.1f}"
            )
        else:
            rows = run(Path(below), repeats=repeats, ragged=not equal)
            show(rows)
            if (missing := unavailable()) is not None:
                print(f"only Headrace: {missing}", file=sys.stderr)
            if rows[0]["disk"] in ("tmpfs", "ramfs"):
                print(f"the log was on {rows[0]['disk']}: nothing reached a disk; see --folder", file=sys.stderr)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
