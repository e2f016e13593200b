"""How much of the ideal overlap of generating and training a run reaches: wall time of a step against the longer of both.

Real buffer, learner and reward processes; the generator is paced by the clock (`paced_generator.py`) and computes
nothing, so that on few cores it takes time as an accelerator of its own would. Per run, of the same steps:

    generate    tokens that the steps needed (dropped groups included) / (slots x pace)
    train       the learner's own work: median of training, commit and publication, plus pulling a step that is ready
    ideal       max(generate, train); share = ideal / wall time; "of mean" takes the mean of the steps for train, which
                counts what other programs on the machine cost as training and not as a lost share

The pace of each run is set from the one before it at the same lag, at first from a run that is not measured, such that
generating takes as long as training: the hardest case, for then every wait on either side is lost. Lags take turns, so
that a busy machine slows all of them.

    python -m tools.benchmarks.overlap --repeats 5 --json overlap.json
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.config import Config, NewModel, load_config
from engine.models import create_model
from protocols.log import Log
from workers.roles import ROLE_COMMAND, role_command
from workers.supervise import Supervisor

ALPHABET = " #ax0123456789"
MODEL = NewModel(ALPHABET, hidden=80, layers=3, heads=4, kv_heads=2, intermediate=208, context=256)
WARM_UP = 3
"""Steps before the measured ones."""
TIMEOUT_S = 180.0
ENDLESS_PACE = 1e6
"""Tokens a second and slot at which the learner never waits."""

CONFIG = """
name = "overlap"
steps = 1
runs = "{folder}"
seed = 7
model = {{ type = "path", path = "{folder}/model" }}
tasks = [{{ type = "jsonl", path = "{folder}/prompts.jsonl", chat = false, extract = "hashes", held_out = 0, score.type = "exact" }}]
objective = {{ type = "dapo" }}
buffer = {{ groups_per_step = 12, samples_per_group = 8, prompt_tokens = 16 }}
generator = {{ sampling = {{ max_tokens = 200 }}, engine = {{ type = "torch", slots = {slots} }} }}
learner = {{ lr = 1e-5, token_budget = 4096, checkpoint_every = 100000, device = "cpu" }}
"""

Row = dict[str, float | str]


class Measured(Struct, frozen=True):
    """One run: seconds a step, shares, and lags in steps."""

    pace: float
    wall: float
    generate: float
    train: float
    train_mean: float
    """As `train`, with the mean of the steps in place of their median: disturbances of the machine included."""
    pull: float
    waited: float
    keep: float
    lag_mean: float
    lag_max: float
    masked: float
    """Share of tokens without loss, for they were older than the lag that is allowed."""

    @property
    def ideal(self) -> float:
        return max(self.generate, self.train)

    @property
    def share(self) -> float:
        return self.ideal / self.wall

    @property
    def share_of_mean(self) -> float:
        return max(self.generate, self.train_mean) / self.wall


class Bench(Struct, frozen=True):
    """Where runs are made and what they have in common."""

    folder: Path
    slots: int
    steps: int

    def prepare(self) -> None:
        """Model, prompts (whose answer is the prompt) and config."""
        create_model(MODEL, self.folder / "model", 0)
        rows = "".join(json.dumps({"prompt": str(n), "answer": str(n)}) + "\n" for n in range(10_000, 20_000))
        (self.folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
        text = CONFIG.format(folder=self.folder, slots=self.slots)
        (self.folder / "overlap.toml").write_text(text, encoding="utf-8")

    def run(self, name: str, *, lag: int, pace: float, pull: float | None = None) -> Measured:
        """One run in processes of its own; `pull` is the time to pull a step that is ready, None to measure it here."""
        # The ledger issues no more than what the last steps need: those stay out of the figures.
        steps = WARM_UP + self.steps + 1 + lag + 1
        overrides = [f"name={name}", f"steps={steps}", f"buffer.max_lag={lag}"]
        path = self.folder / "overlap.toml"
        config = load_config(path, overrides)
        play(config, [str(path), *(part for override in overrides for part in ("--set", override))], pace)
        with Log.open(config.run_dir / "rollouts.db") as log:
            return figures(log, first=WARM_UP + 1, count=self.steps, slots=self.slots, pace=pace, pull=pull)


def play(config: Config, arguments: list[str], pace: float) -> None:
    """Starts the roles and returns when all have ended. Raises RuntimeError with the log of one that failed."""
    supervisor = Supervisor(config.run_dir / "logs")
    deadline = time.monotonic() + TIMEOUT_S
    env = {"OMP_NUM_THREADS": "1", "HEADRACE_TETHERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    published = config.run_dir / "address"
    try:
        command = role_command("buffer", config, arguments, address="", resume=False, command=ROLE_COMMAND)
        supervisor.start("buffer", command, env)
        while not published.exists():
            watch(supervisor, deadline, "the buffer's address")
        address = published.read_text(encoding="utf-8").strip()
        paced = [sys.executable, "-m", "tools.benchmarks.paced_generator", *arguments, "--join", address]
        supervisor.start("generator-0", [*paced, "--pace", str(pace)], env)
        for name in ("learner", "reward-0"):
            command = role_command(name, config, arguments, address=address, resume=False, command=ROLE_COMMAND)
            supervisor.start(name, command, env)
        while supervisor.running:
            watch(supervisor, deadline, f"the end of {', '.join(supervisor.running)}")
    finally:
        supervisor.stop(supervisor.running, grace_s=2.0)


def watch(supervisor: Supervisor, deadline: float, what: str) -> None:
    for exit in supervisor.exits():
        if exit.code != 0:
            raise RuntimeError(f"benchmark: {exit.name} ended with {exit.how}:\n{exit.tail}")
    if time.monotonic() > deadline:
        raise TimeoutError(f"benchmark: waited {TIMEOUT_S:.0f} s for {what}")
    time.sleep(0.05)


def figures(log: Log, *, first: int, count: int, slots: int, pace: float, pull: float | None) -> Measured:
    """Of the `count` steps from `first` on: from the start of its training to the start of that of the step after them.
    What was generated meanwhile are the groups that were decided from one step's last group on to the other's."""
    rows = log.query("SELECT started_at, metrics FROM steps WHERE step BETWEEN ? AND ?", first, first + count)
    started = [float(row[0]) for row in rows]
    metrics = [json.loads(row[1]) for row in rows]
    waits = [each["wait_s"] for each in metrics[1:]]
    cycles = [after - before for before, after in pairwise(started)]
    works = [cycle - wait for cycle, wait in zip(cycles, waits, strict=True)]
    pull = statistics.median(waits) if pull is None else pull
    groups = log.query(
        """SELECT g.step, g.status, max(f.received_at), sum(r.response_tokens) FROM groups AS g
        JOIN rollouts AS r ON r.group_id = g.id JOIN grades AS f ON f.group_id = g.id AND f.sample = r.sample
        WHERE g.status IN ('trained', 'dropped') GROUP BY g.id"""
    )
    begin, end = (max(at for step, _, at, _ in groups if step == wanted) for wanted in (first, first + count))
    needed = [(status, tokens) for _, status, at, tokens in groups if begin < at <= end]
    return Measured(
        pace=pace,
        wall=sum(cycles) / count,
        generate=sum(tokens for _, tokens in needed) / (slots * pace) / count,
        train=statistics.median(works) + pull,
        train_mean=statistics.mean(works) + pull,
        pull=pull,
        waited=sum(max(0.0, wait - pull) for wait in waits) / sum(cycles),
        keep=sum(status == "trained" for status, _ in needed) / len(needed),
        lag_mean=statistics.mean(each["lag_mean"] for each in metrics[:-1]),
        lag_max=max(each["lag_max"] for each in metrics[:-1]),
        masked=statistics.mean(each["masked_fraction"] for each in metrics[:-1]),
    )


def run(lags: list[int], *, repeats: int, steps: int, slots: int, balance: float, pace: float | None) -> list[Row]:
    """One row a lag, of `repeats` runs each."""
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        bench = Bench(Path(folder), slots, steps)
        bench.prepare()
        free = bench.run("free", lag=2, pace=ENDLESS_PACE)
        # Tokens a step and slot, from the time that they took at this pace.
        tokens = free.generate * ENDLESS_PACE
        train = dict.fromkeys(lags, free.train)
        found: dict[int, list[Measured]] = {lag: [] for lag in lags}
        for repeat in range(repeats):
            for lag in lags:
                rate = pace or tokens / (balance * train[lag])
                found[lag].append(bench.run(f"lag{lag}-{repeat}", lag=lag, pace=rate, pull=free.pull))
                train[lag] = found[lag][-1].train
    facts: Row = {"slots": slots, "steps": steps, "repeats": repeats, "balance": balance, "tokens_per_slot": tokens}
    return [{"lag": lag, **summary(runs), **facts, "load": os.getloadavg()[0]} for lag, runs in found.items()]


def summary(runs: list[Measured]) -> Row:
    """Median, lowest and highest of every figure over the runs."""
    row: Row = {}
    for what in (*Measured.__struct_fields__, "ideal", "share", "share_of_mean"):
        values = [float(getattr(run, what)) for run in runs]
        row |= {what: statistics.median(values), f"{what}_low": min(values), f"{what}_high": max(values)}
    return row


def show(rows: list[Row]) -> None:
    table = Table(title="Wall time of a step against max(generate, train): median (lowest to highest)")
    for column in (
        "max lag",
        "share of ideal",
        "wall ms",
        "generate ms",
        "train ms",
        "learner waits",
        "lag mean, max, masked",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        times = [spread(row, what, 1e3, ".0f") for what in ("wall", "generate", "train")]
        shares = [spread(row, what, 1e2, ".0f") + " %" for what in ("share", "share_of_mean", "waited")]
        lags = f"{float(row['lag_mean']):.2f}, {float(row['lag_max_high']):.0f}, {float(row['masked']):.0%}"
        table.add_row(str(row["lag"]), *shares[:2], *times, shares[2], lags)
    Console().print(table)


def spread(row: Row, what: str, scale: float, form: str) -> str:
    middle, low, high = (format(float(row[what + end]) * scale, form) for end in ("", "_low", "_high"))
    return f"{middle} ({low} to {high})"


def main(
    lags: Annotated[str, typer.Option(help="Comma-separated values of buffer.max_lag.")] = "0,1,2",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=5, help="Measured steps of each run.")] = 20,
    slots: Annotated[int, typer.Option(min=1, help="Of the paced generator.")] = 24,
    balance: Annotated[
        float, typer.Option(min=0.1, help="Generating takes this many times as long as training.")
    ] = 1.0,
    pace: Annotated[float | None, typer.Option(help="Tokens a second and slot, in place of --balance.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure how far generating and training overlap at each lag."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that neither processes nor the temporary folder stay
    parsed = [int(lag) for lag in lags.split(",")]
    rows = run(parsed, repeats=repeats, steps=steps, slots=slots, balance=balance, pace=pace)
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
