"""Seconds and memory of one training step on one stored batch: our learner against the loss of TRL's `GRPOTrainer`.

Groups of 8 responses (lognormal lengths) to a shared prompt, a random Llama of SmolLM2-135M's shape in fp32, DAPO's loss
without a KL term, the same advantages and old log-probabilities, micro-batches of one group, one thread. Ours is all of
`TorchLearner.step`: packing, loss, backward, metrics, gradient norm and AdamW (only clipping is off, so that the gradient
can be compared). TRL's is its `compute_loss` and backward alone, on inputs prepared before, each micro-batch padded to its
own longest response (the trainer itself pads to the longest of all). Both must come to the same loss and gradient norm;
how far they are apart is printed.

Without Triton, so on a CPU, TRL 1.16 computes the output layer for prompt and padding positions too, and masks them after
that; on a GPU it leaves them out. The ratios here hold for a CPU.

Every measurement has a process of its own, ours and TRL's in turns. Memory is the peak of resident memory over what it was
just before, with weights, gradient and (ours) AdamW's moments already resident: activations and whatever else is
temporary. Our learner sets glibc's allocator by itself (see `engine.host_memory`); TRL's process has what glibc does.

    python -m tools.benchmarks.learner --repeats 5 --json learner.json
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from msgspec import to_builtins
from rich.console import Console
from rich.table import Table

from engine.attention import NAME
from engine.config import Config, parse_config
from engine.learn_torch import TorchLearner
from protocols.messages import Batch
from tools.benchmarks.learner_batch import (
    CLIP_HIGH,
    CLIP_LOW,
    PROMPT,
    SAMPLES,
    make_batch,
    make_model,
    response_lengths,
    store_old,
)
from tools.benchmarks.learner_process import Measured, in_process, measured, norm
from tools.benchmarks.learner_trl import measure_trl

SIDES = ("ours", "trl")
MISSING = "trl is not installed, so only our own side is measured; to compare: pip install -e '.[bench]'"

Row = dict[str, float | str]


def run(*, groups: int, repeats: int, threads: int, checkpointing: list[bool]) -> list[Row]:
    """One row for each of `checkpointing`: medians, lowest and highest of both sides, their ratios."""
    sides = SIDES if importlib.util.find_spec("trl") else SIDES[:1]
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "old_logprobs.npy"
        in_process(store_old, groups, threads, str(stored))
        return [measure(groups, repeats, threads, str(stored), sides, layers) for layers in checkpointing]


def measure(groups: int, repeats: int, threads: int, stored: str, sides: tuple[str, ...], checkpointing: bool) -> Row:
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            got = in_process(MEASURES[side], groups, threads, stored, checkpointing)
            found[side].append(got)
            figures = ", ".join(f"{what} {value:.6g}" for what, value in to_builtins(got).items())
            print(f"{side}: {figures}", file=sys.stderr, flush=True)  # minutes pass between two of these
    lengths = response_lengths(groups)
    row: Row = {
        "gradient_checkpointing": float(checkpointing),
        "groups": groups,
        "trained_tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "positions_ours": int(groups * (PROMPT - SAMPLES) + lengths.sum()),
        "positions_trl": int(SAMPLES * sum(PROMPT + own.max() for own in lengths.reshape(groups, SAMPLES))),
        "repeats": repeats,
        "load": os.getloadavg()[0],
    }
    for side in sides:
        for what in Measured.__struct_fields__:
            row |= _spread(f"{side}_{what}", [getattr(one, what) for one in found[side]])
        speeds = [row["trained_tokens"] / one.seconds for one in found[side]]  # type: ignore[operator]
        row |= _spread(f"{side}_tokens_per_s", speeds)
    if "trl" in sides:
        pairs = list(zip(found["ours"], found["trl"], strict=True))
        for what in ("seconds", "cpu_seconds", "peak_bytes"):
            row |= _spread(f"ratio_{what}", [getattr(trl, what) / getattr(ours, what) for ours, trl in pairs])
        row["loss_difference"] = max(abs(ours.loss - trl.loss) for ours, trl in pairs)
        row["grad_norm_difference"] = max(abs(ours.grad_norm / trl.grad_norm - 1) for ours, trl in pairs)
    return row


# --- our side, in a process of its own --------------------------------------------------------------------


def measure_ours(groups: int, threads: int, stored: str, checkpointing: bool) -> Measured:
    batch = make_batch(groups, np.load(stored))
    learner = TorchLearner(_config(groups, batch, checkpointing), make_model(NAME, threads))
    for tensor in (learner.optimizer.gradient, *learner.optimizer.state().values()):
        tensor.zero_()  # makes its pages resident
    return measured(lambda: _step(learner, batch))


def _step(learner: TorchLearner, batch: Batch) -> Callable[[], tuple[float, float]]:
    metrics = learner.step(1, [batch])
    return lambda: (metrics["loss"], norm(list(learner.optimizer.views.values())))


def _config(groups: int, batch: Batch, checkpointing: bool) -> Config:
    """Micro-batches of one group: the budget is what the largest one takes."""
    largest = PROMPT - SAMPLES + int(batch.lengths.reshape(groups, SAMPLES).sum(axis=1).max())
    objective = {"type": "dapo", "clip_low": CLIP_LOW, "clip_high": CLIP_HIGH, "correction": {"type": "none"}}
    data = {
        "name": "benchmark", "steps": 1, "model": {"type": "path", "path": ""}, "tasks": [], "objective": objective,
        "buffer": {"groups_per_step": groups, "samples_per_group": SAMPLES},
        "learner": {"lr": 1e-6, "token_budget": largest, "gradient_checkpointing": checkpointing, "device": "cpu",
                    "grad_clip": 0.0},
    }  # fmt: skip
    return parse_config(data, "benchmark")


MEASURES: dict[str, Callable[[int, int, str, bool], Measured]] = {"ours": measure_ours, "trl": measure_trl}


# --- what is printed ----------------------------------------------------------------------------------------------


def _spread(name: str, values: list[float]) -> Row:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def show(rows: list[Row]) -> None:
    table = Table(title="One step, 135M parameters in fp32: median, lowest to highest")
    for column in ("", "positions", "seconds", "CPU seconds", "trained tokens/s", "temporary GiB"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        name = ", checkpointing" if row["gradient_checkpointing"] else ""
        for side in SIDES:
            if f"{side}_seconds" in row:
                figures = [_cell(row, f"{side}_{what}") for what in ("seconds", "cpu_seconds", "tokens_per_s")]
                memory = _cell(row, f"{side}_peak_bytes", scale=2**30, digits=2)
                table.add_row(side + name, f"{row[f'positions_{side}']:,}", *figures, memory)
        if "ratio_seconds" in row:
            ratios = [_cell(row, f"ratio_{what}", digits=2) for what in ("seconds", "cpu_seconds", "peak_bytes")]
            table.add_row("trl / ours" + name, "", ratios[0], ratios[1], "", ratios[2], end_section=True)
    Console().print(table)
    for row in rows:
        print(f"{row['groups']} groups of {SAMPLES}, {row['trained_tokens']:,} trained tokens", end="")
        if "loss_difference" in row:
            print(f"; loss {row['ours_loss']:.6f} (ours), {row['trl_loss']:.6f} (trl), apart by ", end="")
            print(f"{row['loss_difference']:.1e}; gradient norm {row['ours_grad_norm']:.6f} (ours), ", end="")
            print(f"{row['trl_grad_norm']:.6f} (trl), apart by {row['grad_norm_difference']:.1e} of it", end="")
        print()
    if not all("trl_seconds" in row for row in rows):
        print(MISSING)


def _cell(row: Row, what: str, *, scale: float = 1.0, digits: int = 1) -> str:
    middle, low, high = (float(row[what + end]) / scale for end in ("", "_low", "_high"))
    return f"{middle:.{digits}f}\n{low:.{digits}f} to {high:.{digits}f}"


def main(
    groups: Annotated[int, typer.Option(min=1, help=f"Prompts of the batch, {SAMPLES} responses each.")] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of both.")] = 1,
    checkpointing: Annotated[bool, typer.Option(help="Also measure both with gradient checkpointing.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare a step of the learner with the loss and backward of TRL's GRPOTrainer."""
    rows = run(
        groups=groups, repeats=repeats, threads=threads, checkpointing=[False, True] if checkpointing else [False]
    )
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
