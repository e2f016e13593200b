"""Bytes and seconds of sparse weight updates against dense ones: 135M bfloat16 parameters, one subscriber, over loopback.

Both are verified in full at the other end. The seconds run from the return of `publish` until the subscriber can take the
update, so finding what changed is in them. A share of all weights, spread evenly, gets another last bit in every version.
"""

from __future__ import annotations

import os
import statistics
import time
from multiprocessing.connection import Connection

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.weights import Publisher, Terms, fingerprints
from tools.benchmarks.weights_receiver import HOST, TIMEOUT_S, ask, receiver, shapes

WARM_UP = 2
GIGABIT = 125e6
"""Bytes a second of an ordinary network."""

Row = dict[str, float | str]


def run(shares: list[float], *, repeats: int) -> list[Row]:
    """One row a share of changed weights, after one of dense updates."""
    torch.set_num_threads(1)
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes().items()}
    with receiver() as other:
        return [
            measure(share, tensors, other, sparse=sparse, repeats=repeats)
            for share, sparse in [(shares[0], False), *((share, True) for share in shares)]
        ]


def measure(share: float, tensors: dict[str, Tensor], other: Connection, *, sparse: bool, repeats: int) -> Row:
    samples: dict[str, list[float]] = {"seconds": [], "bytes": [], "changed": [], "patch_s": []}
    with Publisher(HOST, Terms(peer_timeout_s=TIMEOUT_S, sparse=sparse)) as publisher:
        ask(other, "join", publisher.address[1])
        for version in range(WARM_UP + repeats):
            change(tensors, share, version)
            prints = fingerprints(tensors)
            publisher.wait(TIMEOUT_S)
            before = publisher.counters
            publisher.publish(version, tensors, fingerprints=prints)
            published = time.monotonic()
            arrived, _ = ask(other, "take", version)
            publisher.wait(TIMEOUT_S)
            after = publisher.counters
            if version >= WARM_UP:
                samples["seconds"].append(arrived - published)
                samples["changed"].append(after["changed"])
                for what in ("bytes", "patch_s"):
                    samples[what].append(after[what] - before[what])
        ask(other, "leave", None)
    row: Row = {
        "updates": f"{share:.1%} changed" if sparse else "dense",
        "repeats": repeats,
        "load": os.getloadavg()[0],
    }
    for what, values in samples.items():
        row |= {what: statistics.median(values), f"{what}_low": min(values), f"{what}_high": max(values)}
    return row


def change(tensors: dict[str, Tensor], share: float, seed: int) -> None:
    """Give `share` of all entries, in about equal numbers everywhere, another last bit."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors.values():
        count = max(1, round(share * tensor.numel()))
        places = torch.randint(tensor.numel(), [count], generator=generator).unique()
        tensor.view(-1).view(torch.int16)[places] ^= 1


def show(rows: list[Row]) -> None:
    table = Table(title="135M bfloat16 parameters, publisher to subscriber: median (lowest to highest)")
    for column in ("updates", "MB", "of dense", "ms", "of which finding", "at 1 Gbit/s (computed)"):
        table.add_column(column, justify="left" if column == "updates" else "right")
    dense = float(rows[0]["bytes"])
    for row in rows:
        size, seconds = float(row["bytes"]), [float(row["seconds" + end]) * 1e3 for end in ("", "_low", "_high")]
        table.add_row(
            str(row["updates"]), f"{size / 1e6:.2f}", f"{size / dense:.2%}", "{:.0f} ({:.0f} to {:.0f})".format(*seconds),
            f"{float(row['patch_s']) * 1e3:.0f}", f"{size / GIGABIT + float(row['patch_s']):.2f} s",
        )  # fmt: skip
    Console().print(table)
