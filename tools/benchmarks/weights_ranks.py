"""Seconds of a weight update from several learner ranks, each on a host of its own whose network is the narrow place.

Every rank keeps a share of the weights (135M bfloat16 parameters, 269 MB) and sends that. The hosts are network namespaces on a
switch; the learner's ranks send at most `--mbit` a second each, the generator's host takes what comes. The seconds run from the
moment that the first rank's `publish` returned until the generator can take the verified update. Needs root.

    python -m tools.benchmarks.weights_ranks --repeats 5 --json ranks.json
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine.weights import Keeper, Publisher, Subscriber, Terms, fingerprints
from tools.benchmarks.weights_receiver import TIMEOUT_S, shapes
from tools.faults.switch import NoNetwork, Switch

WARM_UP = 1
GENERATOR = "generator"
QUIET = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Addresses in the namespaces have no names, which PyTorch would say of every connection."""

Row = dict[str, float | str]


class Process:
    """One of this file's processes on a host of the switch; it answers a line with a line of JSON."""

    def __init__(self, switch: Switch, host: str, *arguments: str) -> None:
        command = switch.on(host, [sys.executable, "-m", "tools.benchmarks.weights_ranks", *arguments])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET)
        self._what = " ".join(arguments)

    def say(self, line: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        """The next answer. Raises `TimeoutError`."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 2 * TIMEOUT_S)[0]:
            raise TimeoutError(f"benchmark: waited {2 * TIMEOUT_S:.0f} s for {self._what}")
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(ranks: int, *, mbit: int, repeats: int) -> Row:
    hosts = [f"rank-{rank}" for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        switch = Switch([*hosts, GENERATOR])
        stack.callback(switch.close)
        for host in hosts:
            switch.limit(host, mbit)

        def start(host: str, *arguments: str) -> Process:
            process = Process(switch, host, *arguments)
            stack.callback(process.end)
            return process

        first = start(hosts[0], "publish", switch.address(hosts[0]), str(ranks))
        where = [switch.address(hosts[0]), str(first.hear())]
        learner = [
            first,
            *(start(host, "keep", *where, str(ranks), str(rank)) for rank, host in enumerate(hosts) if rank),
        ]
        generator = start(GENERATOR, "receive", *where)
        for process in (*learner[1:], generator):
            process.hear()
        seconds, kept = [], []
        for version in range(WARM_UP + repeats):
            for process in learner:
                process.say(version)
            generator.say(version)
            said = [process.hear() for process in learner]
            arrived = generator.hear()
            if version >= WARM_UP:
                seconds.append(arrived - said[0]["at"])
                kept = [rank["nbytes"] for rank in said]
    return {
        "ranks": ranks,
        "mbit": mbit,
        "seconds": statistics.median(seconds),
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "kept_by_a_rank": max(kept),
        "load": os.getloadavg()[0],
    }


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes().items()}


def publish(address: str, ranks: int) -> None:
    with Publisher(address, Terms(ranks=ranks, peer_timeout_s=TIMEOUT_S)) as publisher:
        tensors, prints = prepared()
        say(publisher.address[1])
        for version in asked():
            publisher.publish(version, tensors, fingerprints=prints)
            say({"at": time.monotonic(), "nbytes": publisher.nbytes})


def keep(address: str, port: int, ranks: int, rank: int) -> None:
    with Keeper(address, port, rank=rank, terms=Terms(ranks=ranks, peer_timeout_s=TIMEOUT_S)) as keeper:
        tensors, prints = prepared()
        say(rank)
        for version in asked():
            keeper.keep(version, tensors, fingerprints=prints)
            say({"nbytes": keeper.nbytes})


def receive(address: str, port: int) -> None:
    with Subscriber(address, port, name="receiver", timeout_s=TIMEOUT_S) as subscriber:
        say(None)
        for version in asked():
            with subscriber.wait(TIMEOUT_S) as update:
                if update.version != version:
                    raise ValueError(f"benchmark: got version {update.version}, expected {version}")
                say(time.monotonic())


def prepared() -> tuple[dict[str, Tensor], dict[str, str]]:
    torch.set_num_threads(1)
    tensors = weights()
    return tensors, fingerprints(tensors)


def asked() -> Iterator[int]:
    for line in sys.stdin:
        yield int(line)


def say(answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def show(rows: list[Row]) -> None:
    rate = f"{rows[0]['mbit']} Mbit/s"
    table = Table(
        title=f"135M bfloat16 parameters from learner ranks that send {rate} each: median (lowest to highest)"
    )
    for column in ("ranks", "seconds", "speed", "kept by a rank"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = "{:.2f} ({:.2f} to {:.2f})".format(*(float(row["seconds" + end]) for end in ("", "_low", "_high")))
        speed = float(rows[0]["seconds"]) / float(row["seconds"])
        table.add_row(str(row["ranks"]), seconds, f"{speed:.2f}x", f"{float(row['kept_by_a_rank']) / 1e6:.1f} MB")
    Console().print(table)


def main(
    ranks: Annotated[str, typer.Option(help="Comma-separated numbers of learner ranks.")] = "1,2,4",
    mbit: Annotated[int, typer.Option(min=1, help="What a rank's host can send, in Mbit a second.")] = 250,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure updates from several ranks whose hosts' networks are slow."""
    try:
        rows = [measure(int(count), mbit=mbit, repeats=repeats) for count in ranks.split(",")]
    except NoNetwork as error:
        print(f"weights_ranks: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["publish", address, ranks]:
            publish(address, int(ranks))
        case ["keep", address, port, ranks, rank]:
            keep(address, int(port), int(ranks), int(rank))
        case ["receive", address, port]:
            receive(address, int(port))
        case _:
            typer.run(main)
