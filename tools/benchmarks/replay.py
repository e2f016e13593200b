"""What a replay spends on its data, and whether its memory grows with the log.

Share: a stored run of SmolLM2-135M's shape (random weights and tokens; groups of 8 responses, lognormal around 128 tokens,
to a prompt of 256) is trained step by step from its log, as `headrace replay` does. Measured of every step: reading and
decoding its groups, packing them, and the training as a whole, which packs once itself. The log was just written, so the
system's page cache has it.

Memory: a small model's run of S steps and one of 10 S steps, each step with 65,536 response tokens (0.9 MB of log),
verified by `headrace replay --verify` in processes of their own, in turns; the peak of resident memory of each.

    python -m tools.benchmarks.replay --repeats 5 --json replay.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from engine.packing import pack
from tools.benchmarks.learner_process import in_process
from tools.benchmarks.replay_log import large_run, run_config, small_run
from workers.log_feed import LogFeed
from workers.replay_source import StoredRun
from workers.trainer import Trainer

TARGET_SHARE, TARGET_GROWTH = 0.05, 0.05
TIMEOUT_S = 600.0

Row = dict[str, float | str]


def run(*, groups: int, repeats: int, threads: int, steps: int) -> list[Row]:
    """The two rows: the data's share of a step, and the memory's growth."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        share = in_process(measure_share, folder, groups, repeats, threads)
        return [share, measure_memory(Path(folder), steps=steps, repeats=repeats)]


# --- share -----------------------------------------------------------------------------------------------------------


def measure_share(folder: str, groups: int, repeats: int, threads: int) -> Row:
    """Medians over `repeats` steps, each of groups of its own, after one that is not counted."""
    torch.set_num_threads(threads)
    run_dir = large_run(Path(folder) / "large", steps=repeats + 1, groups=groups, threads=threads)
    config = run_config(run_dir, steps=repeats + 1, groups=groups, threads=threads)
    found: dict[str, list[float]] = {what: [] for what in ("read_s", "pack_s", "train_s", "share", "tokens")}
    with StoredRun.open(run_dir) as source:
        trainer = Trainer(config, LogFeed(source.log, last=repeats + 1), rank=0, world=1, device="cpu")
        for step in range(1, repeats + 2):
            began = time.perf_counter()
            plan, updates = trainer.pull(step)
            pulled = time.perf_counter()
            for batch in updates:
                pack(batch, token_budget=config.learner.token_budget, device="cpu")
            packed = time.perf_counter()
            trainer.train(plan, updates, wait_s=0.0)
            read, packing, training = pulled - began, packed - pulled, time.perf_counter() - packed
            print(
                f"step {step}: read {read:.4f} s, pack {packing:.4f} s, train {training:.1f} s",
                file=sys.stderr,
                flush=True,
            )
            if step > 1:
                tokens = float(sum(batch.lengths.sum() for batch in updates))
                share = (read + packing) / (read + training)
                for values, value in zip(found.values(), (read, packing, training, share, tokens), strict=True):
                    values.append(value)
    row: Row = {"what": "share", "groups": groups, "repeats": repeats, "load": os.getloadavg()[0]}
    for what, values in found.items():
        row |= spread(what, values)
    return row


# --- memory ----------------------------------------------------------------------------------------------------------


def measure_memory(folder: Path, *, steps: int, repeats: int) -> Row:
    """Peaks of a replay of S and of 10 S steps."""
    runs = {}
    for name, count in (("short", steps), ("long", 10 * steps)):
        planned = small_run(folder / f"{name}-planned", steps=count, groups=64)
        runs[name] = folder / name
        headrace("replay", str(planned), "--out", str(runs[name]))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run_dir in runs.items():
            peak = headrace("replay", str(run_dir), "--verify")
            print(f"{name}: peak {peak / 2**20:.1f} MiB", file=sys.stderr, flush=True)
            found[name].append(peak)
    growth = [long / short - 1 for short, long in zip(found["short"], found["long"], strict=True)]
    sizes = {f"{name}_log_bytes": float((run_dir / "rollouts.db").stat().st_size) for name, run_dir in runs.items()}
    row: Row = {"what": "memory", "steps": steps, "repeats": repeats, "load": os.getloadavg()[0], **sizes}
    for name, peaks in found.items():
        row |= spread(f"{name}_peak_bytes", peaks)
    return row | spread("growth", growth)


def headrace(*arguments: str) -> float:
    """Runs a command in a process of its own; its peak of resident memory in bytes. Raises RuntimeError when it fails."""
    with tempfile.TemporaryFile("w+") as said:
        command = [sys.executable, "-m", "workers.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        deadline = time.monotonic() + TIMEOUT_S
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"benchmark: headrace {' '.join(arguments)}: not done after {TIMEOUT_S:.0f} s")
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.returncode != 0:
            said.seek(0)
            raise RuntimeError(
                f"benchmark: headrace {' '.join(arguments)}: exit code {process.returncode}: {said.read()}"
            )
    return ended[2].ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


# --- what is printed ---------------------------------------------------------------------------------------------------


def spread(name: str, values: list[float]) -> Row:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def show(rows: list[Row]) -> None:
    table = Table(title="Replay: median (lowest to highest)")
    for column in ("what", "measured", "wanted"):
        table.add_column(column)
    share, memory = rows
    table.add_row(
        f"a step of 135M parameters, {share['tokens']:,.0f} response tokens",
        f"read {cell(share, 'read_s', 1e3)} ms, pack {cell(share, 'pack_s', 1e3)} ms, train {cell(share, 'train_s', 1)} s",
        "",
    )
    table.add_row(
        "reading, decoding and packing", f"{cell(share, 'share', 100, 4)} % of the step", f"< {TARGET_SHARE:.0%}"
    )
    for name, steps in (("short", float(memory["steps"])), ("long", 10 * float(memory["steps"]))):
        size = float(memory[f"{name}_log_bytes"]) / 1e6
        table.add_row(
            f"peak memory, {steps:.0f} steps, {size:.0f} MB of log",
            f"{cell(memory, f'{name}_peak_bytes', 1 / 2**20)} MiB",
            "",
        )
    table.add_row("growth", f"{cell(memory, 'growth', 100, 2)} %", f"< {TARGET_GROWTH:.0%}")
    Console().print(table)


def cell(row: Row, what: str, scale: float, digits: int = 1) -> str:
    middle, low, high = (float(row[what + end]) * scale for end in ("", "_low", "_high"))
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(
    groups: Annotated[int, typer.Option(min=1, help="Prompts of a large step, 8 responses each.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="S, the steps of the shorter of the two small runs.")] = 10,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the large model.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure what a replay spends on reading its log, and whether its memory grows with it."""
    rows = run(groups=groups, repeats=repeats, threads=threads, steps=steps)
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
