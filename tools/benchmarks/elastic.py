"""Throughput follows the number of generators, and generators of different speed share the work.

A real launch (buffer, learner, reward, launcher) with generators that are paced by the clock, so that two cores suffice,
and `headrace scale` between the windows that are measured:

    count     1 -> 4 -> 1 generators of one speed: response tokens a second that the log took in
    speeds    2 fast generators, then a third that is 4x slower: its share of the responses against a fast one's, and the
              steps a second with it against those without it

The log is audited after each run.

    python -m tools.benchmarks.elastic --repeats 3 --json elastic.json
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from engine.config import NewModel
from engine.models import create_model
from protocols.log import Log
from tools.benchmarks.overlap import ALPHABET
from workers.audit import audit

MODEL = NewModel(ALPHABET, hidden=32, layers=1, heads=2, kv_heads=1, intermediate=64, context=256)
SLOTS = 24
TIMEOUT_S = 240.0
CONFIG = """
name = "NAME"
steps = 1000000
runs = "FOLDER/runs"
seed = 7
model = { type = "path", path = "FOLDER/model" }
tasks = [{ type = "jsonl", path = "FOLDER/prompts.jsonl", chat = false, extract = "hashes", held_out = 0, score.type = "exact" }]
objective = { type = "dapo" }
buffer = { groups_per_step = 16, samples_per_group = 4, prompt_tokens = 16, max_lag = 3, heartbeat_s = 0.5 }
generator = { sampling = { max_tokens = 200 }, engine = { type = "torch", slots = SLOTS } }
learner = { lr = 1e-6, token_budget = 8192, checkpoint_every = 1000000, device = "cpu" }
"""

Row = dict[str, float | str]


class Window(Struct, frozen=True):
    """What a run did in a stretch of time. Tokens and steps are per second; responses are by generator."""

    tokens: float
    steps: float
    responses: dict[str, int]
    wait_share: float
    """Of the time, in which the learner waited for groups."""
    lag_mean: float
    lag_max: float


class Bench:
    """One run; `measure` a window whenever it is as it should be."""

    def __init__(self, folder: Path, name: str, *, window_s: float, settle_s: float) -> None:
        self.folder, self.run_dir = folder, folder / "runs" / name
        self.window_s, self.settle_s = window_s, settle_s
        self.joins: list[float] = []
        text = CONFIG.replace("NAME", name).replace("FOLDER", str(folder)).replace("SLOTS", str(SLOTS))
        self.config = folder / f"{name}.toml"
        self.config.write_text(text, encoding="utf-8")

    @contextmanager
    def launched(self, paces: Mapping[str, float], generators: int) -> Iterator[None]:
        """The run goes on inside; then it is stopped as Ctrl-C does, and its log must be in order."""
        command = [
            sys.executable, "-m", "tools.benchmarks.paced_roles", "launch", str(self.config), "--paces", json.dumps(paces),
            "--set", f"generator.count={generators}",
        ]  # fmt: skip
        with (self.folder / "launch.out").open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            self._await_step(process)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        if wrong := [f"{check.name}: {text}" for check in audit(self.run_dir) for text in check.violations]:
            raise RuntimeError(f"benchmark: {self.run_dir}: {len(wrong)} violations, the first: {wrong[0]}")

    def scale(self, generators: int) -> None:
        """`headrace scale`; notes the seconds until the last of those who join served."""
        command = [sys.executable, "-m", "workers.cli", "scale", str(self.run_dir), f"generator={generators}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"benchmark: {' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        served = [line for line in done.stdout.splitlines() if " serves after " in line]
        self.joins += [float(line.split(" serves after ")[1].split()[0]) for line in served]

    def measure(self) -> Window:
        """Waits until responses begun before are over, then looks at `window_s`."""
        time.sleep(self.settle_s)
        begin = time.time()
        time.sleep(self.window_s)
        end = time.time()
        with Log.open(self.run_dir / "rollouts.db") as log:
            responses = log.query(
                "SELECT worker, count(*), sum(response_tokens) FROM rollouts WHERE received_at BETWEEN ? AND ? GROUP BY worker",
                begin,
                end,
            )
            rows = log.query("SELECT metrics FROM steps WHERE committed_at BETWEEN ? AND ?", begin, end)
        metrics = [json.loads(row[0]) for row in rows]
        if not metrics:
            raise RuntimeError(f"benchmark: {self.run_dir}: no step in {self.window_s:.0f} s")
        return Window(
            tokens=sum(tokens for _, _, tokens in responses) / (end - begin),
            steps=len(metrics) / (end - begin),
            responses={name: count for name, count, _ in responses},
            wait_share=sum(each["wait_s"] for each in metrics) / (end - begin),
            lag_mean=statistics.mean(each["lag_mean"] for each in metrics),
            lag_max=max(each["lag_max"] for each in metrics),
        )

    def _await_step(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        metrics = self.run_dir / "metrics.jsonl"
        while not metrics.exists() or not metrics.stat().st_size:
            if process.poll() is not None or time.monotonic() > deadline:
                text = (self.folder / "launch.out").read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(
                    f"benchmark: {self.run_dir}: no first step within {TIMEOUT_S:.0f} s:\n{text[-2000:]}"
                )
            time.sleep(0.1)


def count(bench: Bench, pace: float) -> Row:
    """1 -> 4 -> 1."""
    with bench.launched({"": pace}, 1):
        first = bench.measure()
        bench.scale(4)
        four = bench.measure()
        bench.scale(1)
        last = bench.measure()
    one = (first.tokens + last.tokens) / 2
    return {
        "case": "count", "ratio": four.tokens / one, "one": first.tokens, "four": four.tokens, "one_again": last.tokens,
        "join_s": max(bench.joins), "learner_waits_four": four.wait_share, "lag_mean_four": four.lag_mean,
    }  # fmt: skip


def speeds(bench: Bench, pace: float) -> Row:
    """Two fast ones, then a slow one beside them."""
    with bench.launched({"": pace, "generator-2": pace / 4}, 2):
        without = bench.measure()
        bench.scale(3)
        beside = bench.measure()
    fast = statistics.mean(beside.responses[f"generator-{i}"] for i in range(2))
    return {
        "case": "speeds", "ratio": beside.responses.get("generator-2", 0) / fast,
        "steps_without": without.steps, "steps_with": beside.steps, "steps_ratio": beside.steps / without.steps,
        "lag_mean_without": without.lag_mean, "lag_mean_with": beside.lag_mean, "lag_max_with": beside.lag_max,
    }  # fmt: skip


def show(rows: list[Row]) -> None:
    table = Table(title="Elastic: medians (lowest to highest) of the runs")
    for column in ("case", "what", "measured", "wanted"):
        table.add_column(column)
    lines = {
        "count": [
            ("tokens/s of 1, 4, 1 generators", ("one", "four", "one_again"), ",.0f", "", ),
            ("4 generators against 1", ("ratio",), ".2f", ">= 3.6"),
            ("seconds until the last of three served", ("join_s",), ".1f", ""),
        ],
        "speeds": [
            ("responses of the slow one against a fast one's", ("ratio",), ".2f", "about 0.25"),
            ("steps a second with it against without it", ("steps_ratio",), ".2f", ">= 1"),
            ("mean lag without, with, and at most (versions)", ("lag_mean_without", "lag_mean_with", "lag_max_with"), ".2f", ""),
        ],
    }  # fmt: skip
    for case, each in lines.items():
        own = [row for row in rows if row["case"] == case]
        for what, names, form, wanted in each:
            if own:
                table.add_row(case, what, ", ".join(_spread(own, name, form) for name in names), wanted)
    Console().print(table)


def _spread(rows: list[Row], name: str, form: str) -> str:
    values = [float(row[name]) for row in rows]
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


@contextmanager
def numbers(prefix: str) -> Iterator[Path]:
    """A temporary folder with a small new model and a file of prompts, both of which the configs of these benchmarks name."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that neither processes nor the temporary folder stay
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        folder = Path(name)
        create_model(MODEL, folder / "model", 0)
        prompts = "".join(json.dumps({"prompt": str(n), "answer": str(n)}) + "\n" for n in range(10_000, 20_000))
        (folder / "prompts.jsonl").write_text(prompts, encoding="utf-8")
        yield folder


def main(
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    window: Annotated[float, typer.Option(min=1.0, help="Seconds of each window that is measured.")] = 20.0,
    settle: Annotated[float, typer.Option(min=0.0, help="Seconds before each of them.")] = 8.0,
    pace: Annotated[float, typer.Option(min=1.0, help="Tokens a second and slot of a generator.")] = 30.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure how throughput follows the number of generators, and how unequal ones share."""
    rows: list[Row] = []
    with numbers("elastic-") as folder:
        for repeat in range(repeats):
            for case in (count, speeds):
                bench = Bench(folder, f"{case.__name__}-{repeat}", window_s=window, settle_s=settle)
                rows.append({"repeat": repeat, "pace": pace, "slots": SLOTS, **case(bench, pace)})
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
