"""How much one buffer bears: a real buffer process, and 64 generators and 16 reward workers that take no time to think.

Each worker is a real link client with a socket and a thread of its own, all in this process and on 127.0.0.1. Generators
answer a ticket after `--delay` seconds, rewards at once; a learner's client asks for plans and commits them, so that the
stream goes on. Per run, after a warm-up:

    messages        that the buffer took from workers, a second (its log's rollouts and grades, and steps)
    cpu             share of one core that the buffer's process used
    saturates at    generators at which that share would be 1: the count here / share, as long as cost is proportional
    us a message    of CPU time in the buffer's process
    ack p99         from `send` of a response until it is acknowledged, so it is durable

The clients of one machine cannot fill a buffer's core. With `--share 0.1` the buffer may run for a tenth of the time only
(it is stopped for the rest of every period), so that they can: what such a buffer takes without a pause is what saturates it,
and a message's cost there, against that of an idle buffer, says whether a whole core can be reckoned from it.

    python -m tools.benchmarks.swarm --repeats 3 --json swarm.json
    python -m tools.benchmarks.swarm --delay 0 --share 0.1
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from engine.config import load_config
from protocols import messages as m
from protocols.link import Client
from protocols.link_messages import Hello, Role
from protocols.log import Log
from tools.benchmarks.elastic import numbers
from tools.faults.processes import slowed
from workers.roles import ROLE_COMMAND, role_command
from workers.supervise import Supervisor

CONFIG = """
name = "NAME"
steps = 1000000
runs = "FOLDER/runs"
model = { type = "path", path = "FOLDER/model" }
tasks = [{ type = "jsonl", path = "FOLDER/prompts.jsonl", chat = false, held_out = 0, score.type = "exact" }]
objective = { type = "dapo" }
buffer = { groups_per_step = 128, samples_per_group = 8, prompt_tokens = 16, max_lag = 3, dynamic_sampling = false }
generator = { sampling = { max_tokens = 4096 } }
learner = { lr = 1e-6 }
"""
CAPACITY = 16
TIMEOUT_S = 60.0
WARM_UP_S = 3.0
PERIOD_S = 0.1
"""Of a buffer with a share: short against a heartbeat, long against a turn of its loop."""

Row = dict[str, float | str]


class Worker(threading.Thread):
    """One link client; `answer` gets each message and may send. Ends when `over` is set."""

    def __init__(self, address: str, role: Role, name: str, over: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        hello = Hello(role=role, name=name, host="here", pid=os.getpid(), capacity=CAPACITY)
        self.client, self.over = Client(address, hello, timeout_s=TIMEOUT_S), over
        self.acks: list[float] = []

    def run(self) -> None:
        while not self.over.is_set():
            if (message := self.client.receive(0.2)) is not None:
                self.answer(message)

    def answer(self, message: m.Message) -> None:
        raise TypeError(f"{self.name}: got {type(message).__name__}, which this worker does not take")


class Generator(Worker):
    def __init__(self, address: str, name: str, over: threading.Event, *, delay_s: float, tokens: int) -> None:
        super().__init__(address, "generator", name, over)
        self.delay_s, self.size = delay_s, tokens
        self.client.status("decodes", version=0)

    def answer(self, message: m.Message) -> None:
        if not isinstance(message, m.Ticket):
            return
        self.over.wait(self.delay_s)
        tokens, logprobs = np.ones(self.size, m.INT), np.full(self.size, -0.5, m.FLOAT)
        sent = time.perf_counter()
        for sample in message.samples:
            rollout = m.Rollout(
                message.group, sample, message.fence, tokens, logprobs, [(0, self.size)], "length", "1", 1.0, 2.0
            )
            self.client.send(rollout)
        self.client.flush(TIMEOUT_S)
        self.acks.append(time.perf_counter() - sent)


class Reward(Worker):
    def __init__(self, address: str, name: str, over: threading.Event) -> None:
        super().__init__(address, "reward", name, over)

    def answer(self, message: m.Message) -> None:
        if isinstance(message, m.GradeTask):
            right = message.sample % 2 == 0
            self.client.send(m.Grade(message.group, message.sample, message.attempt, "graded", right, float(right)))


class Learner(Worker):
    """Commits every step as soon as its groups are there."""

    def __init__(self, address: str, over: threading.Event) -> None:
        super().__init__(address, "learner", "learner-0", over)
        self.client.send(m.PlanRequest(1))

    def answer(self, message: m.Message) -> None:
        if isinstance(message, m.Plan):
            now = time.time()
            self.client.send(m.StepCommit(message.step, "none", "bench", now, now, {}))
            self.client.send(m.PlanRequest(message.step + 1))


def run(
    folder: Path,
    name: str,
    *,
    generators: int,
    rewards: int,
    seconds: float,
    delay_s: float,
    tokens: int,
    share: float = 1.0,
) -> Row:
    """One run with a buffer of its own, which may run for `share` of the time."""
    path = folder / f"{name}.toml"
    path.write_text(CONFIG.replace("NAME", name).replace("FOLDER", str(folder)), encoding="utf-8")
    config = load_config(path)
    config.run_dir.mkdir(parents=True)
    supervisor, over = Supervisor(config.run_dir / "logs"), threading.Event()
    published = config.run_dir / "address"
    try:
        command = role_command("buffer", config, [str(path)], address="", resume=False, command=ROLE_COMMAND)
        supervisor.start("buffer", command, {"OMP_NUM_THREADS": "1", "HEADRACE_TETHERED": "1"})
        _await(published.exists, "the buffer's address", supervisor)
        address = published.read_text(encoding="utf-8").strip()
        with ExitStack() as parts:
            makers: list[Worker] = [
                Generator(address, f"generator-{i}", over, delay_s=delay_s, tokens=tokens) for i in range(generators)
            ]
            workers = [*makers, *(Reward(address, f"reward-{i}", over) for i in range(rewards)), Learner(address, over)]
            for worker in workers:
                parts.enter_context(closing(worker.client))
            for worker in workers:
                parts.callback(worker.join, 5.0)
                worker.start()
            parts.callback(over.set)
            process = psutil.Process(supervisor.pid("buffer"))
            if share < 1:
                parts.enter_context(slowed(process, stopped_s=PERIOD_S * (1 - share), runs_s=PERIOD_S * share))
            time.sleep(WARM_UP_S)
            return _measure(config.run_dir, process, makers, seconds)
    finally:
        over.set()
        supervisor.stop(supervisor.running, grace_s=2.0)


def _measure(run_dir: Path, buffer: psutil.Process, makers: list[Worker], seconds: float) -> Row:
    seen = [len(worker.acks) for worker in makers]
    before, began, at = buffer.cpu_times(), time.monotonic(), time.time()
    time.sleep(seconds)
    after, took, end = buffer.cpu_times(), time.monotonic() - began, time.time()
    acks = sorted(ack for worker, first in zip(makers, seen, strict=True) for ack in list(worker.acks)[first:])
    with Log.open(run_dir / "rollouts.db") as log:
        taken = sum(
            int(log.query(f"SELECT count(*) FROM {table} WHERE {column} BETWEEN ? AND ?", at, end)[0][0])
            for table, column in (("rollouts", "received_at"), ("grades", "received_at"), ("steps", "committed_at"))
        )
    if not acks:
        raise RuntimeError(
            f"benchmark: no group was acknowledged within {took:.0f} s; more --seconds or --share are needed"
        )
    cpu_s = after.user + after.system - before.user - before.system
    return {
        "messages": taken / took, "cpu": cpu_s / took, "us": 1e6 * cpu_s / taken, "saturates": len(makers) * took / cpu_s,
        "groups_acked": len(acks), "ack_p50_ms": 1e3 * acks[len(acks) // 2], "ack_p99_ms": 1e3 * acks[int(0.99 * (len(acks) - 1))],
    }  # fmt: skip


def _await(ready: Callable[[], bool], what: str, supervisor: Supervisor) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not ready():
        for exit in supervisor.exits():
            raise RuntimeError(f"benchmark: {exit.name} ended with {exit.how}:\n{exit.tail}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"benchmark: waited {TIMEOUT_S:.0f} s for {what}")
        time.sleep(0.05)


def show(rows: list[Row]) -> None:
    table = Table(title="One buffer under load: median (lowest to highest)")
    names = {"messages": ("messages/s", ".0f"), "cpu": ("share of a core", ".3f"),
             "us": ("us a message", ".0f"), "saturates": ("saturates at", ".0f"),
             "ack_p50_ms": ("ack p50 ms", ".0f"), "ack_p99_ms": ("ack p99 ms", ".0f")}  # fmt: skip
    for label, _ in names.values():
        table.add_column(label, justify="right")
    cells = []
    for name, (_, form) in names.items():
        values = [float(row[name]) for row in rows]
        cells.append(f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})")
    table.add_row(*cells)
    Console().print(table)


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    generators: Annotated[int, typer.Option(min=1, max=256)] = 64,
    rewards: Annotated[int, typer.Option(min=1, max=64)] = 16,
    seconds: Annotated[float, typer.Option(min=1.0, max=120.0)] = 15.0,
    delay: Annotated[float, typer.Option(min=0.0, help="Seconds a generator takes for a group of 8.")] = 4.0,
    tokens: Annotated[int, typer.Option(min=1, help="Of each response.")] = 512,
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of the time in which the buffer may run.")] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure what a buffer bears."""
    rows: list[Row] = []
    with numbers("swarm-") as folder:
        for repeat in range(repeats):
            rows.append(
                run(
                    folder,
                    f"swarm-{repeat}",
                    generators=generators,
                    rewards=rewards,
                    seconds=seconds,
                    delay_s=delay,
                    tokens=tokens,
                    share=share,
                )
            )
    show(rows)
    if json_path is not None:
        facts: Row = {"generators": generators, "rewards": rewards, "delay_s": delay, "tokens": tokens, "share": share}
        json_path.write_text(json.dumps([{**facts, **row} for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
