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
from typing import Annotated, Any

import torch
import torch.distributed
import torch.multiprocessing
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import TCPStore

from engine.weights import Publisher, Subscriber, fingerprints

HOST = "127.0.0.1"
WARM_UP = 2
"""Transfers before the measured ones: buffers are touched, groups are built."""
TIMEOUT_S = 60.0

Row = dict[str, float | str]


def shapes() -> dict[str, tuple[int, ...]]:
    """The parameters of SmolLM2-135M (tied output): 272 tensors, 134,515,008 numbers."""
    hidden, inner, keys, vocabulary, layers = 576, 1536, 192, 49_152, 30
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        found |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            }.items()
        }  # fmt: skip
    return found


def run(buckets_mib: list[int], *, repeats: int) -> list[Row]:
    """One row a bucket size, and one more at the default size with fingerprints that were computed before."""
    torch.set_num_threads(1)
    tensors = {name: torch.randn(shape) for name, shape in shapes().items()}
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    receiver = context.Process(target=receive, args=[theirs, store.port], daemon=True)
    receiver.start()
    try:
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=2)
        rows = [measure(mib, tensors, ours, repeats=repeats) for mib in buckets_mib]
        prints = fingerprints(tensors)
        rows.append(measure(32, tensors, ours, repeats=repeats, prints=prints))
        ours.send(("end", None))
        receiver.join(TIMEOUT_S)
    finally:
        receiver.kill()
        torch.distributed.destroy_process_group()
    return rows


def measure(
    mib: int, tensors: dict[str, Tensor], receiver: Connection, *, repeats: int, prints: dict[str, str] | None = None
) -> Row:
    flat = torch.randint(0, 255, [sum(tensor.nbytes for tensor in tensors.values())], dtype=torch.uint8)
    samples: dict[str, list[float]] = {what: [] for what in ("raw", "verified", "ratio", "copy_aside", "stall")}
    with Publisher(HOST, bucket_bytes=mib << 20, peer_timeout_s=TIMEOUT_S) as publisher:
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


def ask(receiver: Connection, what: str, argument: Any) -> Any:
    receiver.send((what, argument))
    return answer(receiver)


def answer(receiver: Connection) -> Any:
    if not receiver.poll(TIMEOUT_S):
        raise TimeoutError(f"benchmark: no answer from the receiving process within {TIMEOUT_S} s")
    return receiver.recv()


def receive(learner: Connection, port: int) -> None:
    """The other process: does what the first one asks, and says when it was done (both read one monotonic clock)."""
    torch.set_num_threads(1)
    store = TCPStore(HOST, port, is_master=False, wait_for_workers=False)
    torch.distributed.init_process_group("gloo", store=store, rank=1, world_size=2)
    parameters = {name: torch.zeros(shape) for name, shape in shapes().items()}
    flat = torch.zeros(0, dtype=torch.uint8)
    subscriber: Subscriber | None = None
    while (request := learner.recv())[0] != "end":
        match request:
            case ("raw", size):
                flat = flat if flat.numel() == size else torch.zeros(size, dtype=torch.uint8)
                torch.distributed.barrier()
                torch.distributed.broadcast(flat, 0)
                learner.send(time.monotonic())
            case ("join", address):
                subscriber = Subscriber(HOST, address, name="receiver", timeout_s=TIMEOUT_S)
                learner.send(None)
            case ("take", version) if subscriber is not None:
                learner.send(take(subscriber, version, parameters))
            case ("leave", _) if subscriber is not None:
                subscriber.close()
                learner.send(None)
    torch.distributed.destroy_process_group()


def take(subscriber: Subscriber, version: int, parameters: dict[str, Tensor]) -> tuple[float, float]:
    """(when the verified update was there, seconds to copy it into the parameters)."""
    with subscriber.wait(TIMEOUT_S) as update:
        arrived = time.monotonic()
        if update.version != version:
            raise ValueError(f"benchmark: got version {update.version}, expected {version}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(update.tensors[name])
        return arrived, time.monotonic() - arrived


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
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare publishing weights, verified, with a raw gloo broadcast of the same bytes."""
    rows = run([int(mib) for mib in buckets.split(",")], repeats=repeats)
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
