"""Seconds to move 135M float32 parameters from a publisher to a subscriber, verified, against a raw broadcast.

Two processes on this machine. Both ways move the same 538 MB between them, in turns: ours in buckets, checksums
computed at both ends, until the subscriber can take the update; the other is one `torch.distributed.broadcast` of one
flat tensor over gloo, which checks nothing. Beside that: the copy aside that `publish` makes the learner wait for, and
the copy into a model's parameters that stops a generator.

    python -m tools.benchmarks.weights --repeats 7 --json weights.json
"""

from __future__ import annotations

import json
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.weights import Publisher, Terms, fingerprints
from tools.benchmarks import weights_patches
from tools.benchmarks.weights_receiver import HOST, TIMEOUT_S, answer, ask, receiver, shapes

WARM_UP = 2
"""Transfers before the measured ones: buffers are touched, groups are built."""
Row = dict[str, float | str]


def run(buckets_mib: list[int], *, repeats: int) -> list[Row]:
    """One row a bucket size, and one more at the default size with fingerprints that were computed before."""
    torch.set_num_threads(1)
    tensors = {name: torch.randn(shape) for name, shape in shapes().items()}
    with receiver() as other:
        rows = [measure(mib, tensors, other, repeats=repeats) for mib in buckets_mib]
        prints = fingerprints(tensors)
        rows.append(measure(32, tensors, other, repeats=repeats, prints=prints))
    return rows


def measure(
    mib: int, tensors: dict[str, Tensor], receiver: Connection, *, repeats: int, prints: dict[str, str] | None = None
) -> Row:
    flat = torch.randint(0, 255, [sum(tensor.nbytes for tensor in tensors.values())], dtype=torch.uint8)
    samples: dict[str, list[float]] = {what: [] for what in ("raw", "verified", "ratio", "copy_aside", "stall")}
    with Publisher(HOST, Terms(bucket_bytes=mib << 20, peer_timeout_s=TIMEOUT_S)) as publisher:
        ask(receiver, "join", publisher.address[1])
        for version in range(WARM_UP + repeats):
            raw = broadcast(flat, receiver)
            before = publisher.counters["copy_s"]
            publisher.publish(version, tensors, fingerprints=prints)
            published = time.monotonic()
            arrived, stall = ask(receiver, "take", version)
            if version >= WARM_UP:
                verified = arrived - published
                copied = publisher.counters["copy_s"] - before
                for what, value in zip(samples, (raw, verified, raw / verified, copied, stall), strict=True):
                    samples[what].append(value)
        ask(receiver, "leave", None)
    row: Row = {
        "buckets": f"{mib} MiB" + (", fingerprints given" if prints else ""),
        "bytes": flat.numel(),
        "repeats": repeats,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    for what, values in samples.items():
        row |= {what: statistics.median(values), f"{what}_low": min(values), f"{what}_high": max(values)}
    return row


def broadcast(flat: Tensor, receiver: Connection) -> float:
    """Seconds of one raw broadcast, until both ends are through."""
    receiver.send(("raw", flat.numel()))
    torch.distributed.barrier()
    started = time.monotonic()
    torch.distributed.broadcast(flat, 0)
    ended = time.monotonic()
    return max(ended, float(answer(receiver))) - started


def show(rows: list[Row]) -> None:
    table = Table(title="135M float32 parameters, publisher to subscriber: median (lowest to highest) in ms")
    for column in ("buckets", "verified", "raw broadcast", "speed of raw", "GB/s", "copy aside", "generator stalls"):
        table.add_column(column, justify="left" if column == "buckets" else "right")
    for row in rows:
        verified, raw, aside, stall = (spread(row, what) for what in ("verified", "raw", "copy_aside", "stall"))
        speed = f"{float(row['bytes']) / float(row['verified']) / 1e9:.2f}"
        table.add_row(str(row["buckets"]), verified, raw, f"{float(row['ratio']):.0%}", speed, aside, stall)
    Console().print(table)


def spread(row: Row, what: str) -> str:
    middle, low, high = (float(row[what + end]) * 1e3 for end in ("", "_low", "_high"))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def main(
    buckets: Annotated[str, typer.Option(help="Comma-separated bucket sizes in MiB.")] = "4,8,16,32,64,128",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    changed: Annotated[str, typer.Option(help="Comma-separated shares of bfloat16 weights that a step changes.")] = (
        "0.002,0.01,0.05,0.2"
    ),
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare publishing weights, verified, with a raw gloo broadcast of the same bytes; then sparse updates with dense."""
    rows = run([int(mib) for mib in buckets.split(",")], repeats=repeats)
    show(rows)
    patches = weights_patches.run([float(share) for share in changed.split(",")], repeats=repeats)
    weights_patches.show(patches)
    rows += patches
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
