"""Tokens per second and memory of UTel's forward and backward pass: its fast form, its plain form, transformers' LayoutLM.

2048 tokens as rows of `length`, random boxes, fp32, no dropout, a squared projection of the hidden states as loss. The fast and
the plain form are one function with one set of weights: how far their losses and gradient norms are apart is printed.
LayoutLM has the same sizes and none of the relative terms, so what UTel costs beside it is what these cost; its table of
places ends at 512.

Every measurement has a process of its own, in turns. Memory is the peak of resident memory over what it was just before,
with weights and gradients already resident: activations and whatever else is temporary.

    python -m tools.benchmarks.utel --repeats 5 --json utel.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LayoutLMConfig, LayoutLMModel

from engine.utel.model import Utel, UtelConfig
from tools.benchmarks.learner_process import Measured, in_process, measured, norm

TOKENS = 2048
SIDES = ("fast", "plain", "layoutlm")
LONGEST_LAYOUTLM = 512


class Case(Struct, frozen=True):
    size: str
    length: int

    def config(self, attention: str = "fast") -> UtelConfig:
        config = UtelConfig.base() if self.size == "base" else UtelConfig.small()
        changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention": attention}
        return msgspec.structs.replace(config, **changes)

    def sides(self) -> tuple[str, ...]:
        return SIDES if self.length <= LONGEST_LAYOUTLM else SIDES[:2]


CASES = {
    "small-512": Case("small", 512),
    "small-2048": Case("small", 2048),
    "base-512": Case("base", 512),
    # The plain form takes some 15 GiB.
    "base-2048": Case("base", 2048),
}
USUAL = ("small-512", "small-2048", "base-512")

Row = dict[str, float | str]


def run(names: list[str], *, repeats: int, threads: int) -> list[Row]:
    """One row a case: medians, lowest and highest of each side."""
    return [measure(name, repeats, threads) for name in names]


def measure(name: str, repeats: int, threads: int) -> Row:
    case = CASES[name]
    found: dict[str, list[Measured]] = {side: [] for side in case.sides()}
    for _ in range(repeats):
        for side, runs in found.items():
            runs.append(in_process(measure_side, name, side, threads))
            print(f"{name}, {side}: {runs[-1]}", file=sys.stderr, flush=True)  # up to minutes pass between two of these
    row: Row = {"case": name, "tokens": TOKENS, "repeats": repeats, "load": os.getloadavg()[0]}
    for side, runs in found.items():
        for what in ("seconds", "cpu_seconds", "peak_bytes"):
            row |= _spread(f"{side}_{what}", [getattr(one, what) for one in runs])
        row |= _spread(f"{side}_tokens_per_s", [TOKENS / one.seconds for one in runs])
        row |= _spread(f"{side}_tokens_per_cpu_s", [TOKENS / one.cpu_seconds for one in runs])
    pairs = list(zip(found["fast"], found["plain"], strict=True))
    row["loss_difference"] = max(abs(fast.loss - plain.loss) for fast, plain in pairs)
    row["grad_norm_difference"] = max(abs(fast.grad_norm / plain.grad_norm - 1) for fast, plain in pairs)
    return row


# --- one side, in a process of its own ------------------------------------------------------------------------------


def measure_side(name: str, side: str, threads: int) -> Measured:
    torch.set_num_threads(threads)
    case = CASES[name]
    model, forward = _model(case, side)
    generator = torch.Generator().manual_seed(0)
    rows = TOKENS // case.length
    ids = torch.randint(5, case.config().vocab_size, (rows, case.length), generator=generator)
    corners = torch.randint(0, 900, (rows, case.length, 2), generator=generator)
    sizes = torch.randint(1, 100, (rows, case.length, 2), generator=generator)
    boxes = torch.cat([corners, corners + sizes], dim=-1)
    direction = torch.randn(case.config().hidden_size, generator=generator)
    _loss(forward(ids[:, :8], boxes[:, :8]), direction).backward()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()

    def step() -> Callable[[], tuple[float, float]]:
        loss = _loss(forward(ids, boxes), direction)
        loss.backward()
        return lambda: (loss.item(), norm([p.grad for p in model.parameters() if p.grad is not None]))

    return measured(step)


def _loss(hidden: Tensor, direction: Tensor) -> Tensor:
    """Not of the states' length, which LayerNorm fixes."""
    return (hidden @ direction).square().mean()


def _model(case: Case, side: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    torch.manual_seed(0)
    if side != "layoutlm":
        utel = Utel(case.config(side))
        return utel, utel
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "hidden_dropout_prob", "attention_probs_dropout_prob")  # fmt: skip
    config = case.config()
    layoutlm = LayoutLMModel(LayoutLMConfig(**{name: getattr(config, name) for name in names}))
    return layoutlm, lambda ids, boxes: layoutlm(ids, bbox=boxes).last_hidden_state


# --- what is printed ------------------------------------------------------------------------------------------------


def _spread(name: str, values: list[float]) -> Row:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def show(rows: list[Row]) -> None:
    table = Table(title=f"Forward and backward of {TOKENS} tokens in fp32: median, lowest to highest")
    for column in ("model, length", "form", "tokens/s", "tokens/CPU s", "temporary GiB", "of fast"):
        table.add_column(column, justify="left" if column in ("model, length", "form") else "right")
    for row in rows:
        for side in SIDES:
            if f"{side}_seconds" not in row:
                continue
            speeds = [_cell(row, f"{side}_{what}") for what in ("tokens_per_s", "tokens_per_cpu_s")]
            memory = _cell(row, f"{side}_peak_bytes", scale=2**30, digits=2)
            ratios = [
                float(row[f"{side}_{what}"]) / float(row[f"fast_{what}"]) for what in ("cpu_seconds", "peak_bytes")
            ]
            against = "" if side == "fast" else f"{ratios[0]:.2f}x CPU s\n{ratios[1]:.2f}x memory"
            table.add_row(str(row["case"]), side, *speeds, memory, against)
        table.add_section()
    Console().print(table)
    for row in rows:
        print(f"{row['case']}: fast and plain apart by {row['loss_difference']:.1e} in the loss and by ", end="")
        print(f"{row['grad_norm_difference']:.1e} of the gradient's norm")


def _cell(row: Row, what: str, *, scale: float = 1.0, digits: int = 0) -> str:
    middle, low, high = (float(row[what + end]) / scale for end in ("", "_low", "_high"))
    return f"{middle:,.{digits}f}\n{low:,.{digits}f} to {high:,.{digits}f}"


def main(
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}.")] = ",".join(USUAL),
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of all.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare UTel's two forms with each other and with transformers' LayoutLM."""
    names = cases.split(",")
    if unknown := sorted(set(names) - set(CASES)):
        raise typer.BadParameter(f"got {', '.join(unknown)}, expected some of {', '.join(CASES)}", param_hint="--cases")
    rows = run(names, repeats=repeats, threads=threads)
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
