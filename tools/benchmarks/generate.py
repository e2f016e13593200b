"""Tokens per second of the torch generator against `transformers` generate, on the same random-weights model.

64 sequences in 8 groups of a shared prompt, with skewed (lognormal) response lengths that both must produce: ours as
`max_tokens` of each sample, `transformers` as one padded batch that runs until the longest is done. Only the wanted
tokens count. The two run in turns in one process, so that a busy machine slows both. Where vLLM is installed, the vLLM
generator does the same work in turns with them, in fp32 and bf16, and what an exchange of weights costs it is measured; so
does the SGLang generator where `--sglang` names an interpreter that has it.

    python -m tools.benchmarks.generate --repeats 5 --json generate.json
    python -m tools.benchmarks.generate --models 135M --sglang .venv-sglang/bin/python --launcher tests/sglang_cpu.py \
        --options "--attention-backend torch_native --max-total-tokens 32768"
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from msgspec import Struct
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.attention import NAME
from engine.config import SglangEngine, TorchEngine
from engine.generate_torch import TorchGenerator
from protocols.messages import INT, Rollout, Sampling, Ticket
from tools.benchmarks.generate_engines import errors, exchange, generate
from tools.benchmarks.generate_sglang import Dtype, sglang_generator
from tools.benchmarks.generate_vllm import vllm_generator

GROUPS, SAMPLES, PROMPT = 8, 8, 128
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
CHECKED = 8
"""Sequences whose log-probabilities are compared with a fresh forward pass."""


class Case(Struct, frozen=True):
    """A model's shape and the response lengths: lognormal with this median and sigma, cut at `longest`."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    median: int
    longest: int
    sigma: float = 0.8

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, intermediate_size=self.intermediate,
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def lengths(self) -> np.ndarray:
        drawn = np.random.default_rng(0).lognormal(np.log(self.median), self.sigma, GROUPS * SAMPLES)
        return np.clip(drawn, 1, self.longest).astype(int)


CASES = {
    "1.6M": Case(100, 192, 4, 6, 2, 512, median=64, longest=384),
    # SmolLM2-135M's shape. Short responses: transformers takes half a second a step on one core.
    "135M": Case(49_152, 576, 30, 9, 3, 1536, median=10, longest=28),
}


def run(
    cases: list[str], *, repeats: int, threads: int = 1, sglang: SglangEngine | None = None
) -> list[dict[str, float | str]]:
    """One row a case: median, lowest and highest tokens/s of both, the ratio of the medians, the log-probabilities' error."""
    torch.set_num_threads(threads)
    return [measure(name, CASES[name], repeats, threads, sglang) for name in cases]


def measure(name: str, case: Case, repeats: int, threads: int, sglang: SglangEngine | None) -> dict[str, float | str]:
    torch.manual_seed(0)
    plain = LlamaForCausalLM._from_config(case.config(), attn_implementation="sdpa").eval()
    hooked = LlamaForCausalLM._from_config(case.config(), attn_implementation=NAME).eval()
    hooked.load_state_dict(plain.state_dict(), assign=True)
    prompts = np.random.default_rng(1).integers(1, case.vocabulary, (GROUPS, PROMPT)).astype(INT)
    lengths = case.lengths()
    work = tickets(prompts, lengths)
    with ExitStack() as parts:
        engines = {
            f"vllm_{dtype}": parts.enter_context(vllm_generator(plain, dtype, slots=len(work), threads=threads))
            for dtype in DTYPES
            if importlib.util.find_spec("vllm") is not None
        } | {
            f"sglang_{dtype}": parts.enter_context(sglang_generator(plain, dtype, sglang, threads=threads))
            for dtype in DTYPES
            if sglang is not None
        }
        speeds: dict[str, list[float]] = {who: [] for who in ("ours", "transformers", *engines)}
        made: dict[str, list[Rollout]] = {}
        for _ in range(repeats):
            for who, each in speeds.items():
                began = time.perf_counter()
                if who == "transformers":
                    transformers(plain, prompts, int(lengths.max()))
                else:
                    made[who] = generate(engines[who], work) if who in engines else ours(hooked, work)
                each.append(int(lengths.sum()) / (time.perf_counter() - began))
        more = {
            f"{who}_{what}": value
            for who, engine in engines.items()
            for what, value in (errors(plain, made[who], prompts) | exchange(engine, plain, work)).items()
        }
    row: dict[str, float | str] = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "repeats": repeats,
    }
    for who, each in speeds.items():
        row |= {who: statistics.median(each), f"{who}_low": min(each), f"{who}_high": max(each)}
    row["ratio"] = float(row["ours"]) / float(row["transformers"])
    row["logprob_error"] = errors(plain, made["ours"][:CHECKED], prompts)["error_max"]
    return row | more


def tickets(prompts: np.ndarray, lengths: np.ndarray) -> list[Ticket]:
    """One for each sequence, for each has a length of its own."""
    return [
        Ticket(
            index // SAMPLES, [index % SAMPLES], index % SAMPLES, prompts[index // SAMPLES], Sampling(max_tokens=n), 0
        )
        for index, n in enumerate(lengths.tolist())
    ]


def ours(model: PreTrainedModel, work: list[Ticket]) -> list[Rollout]:
    """Every sequence through a new generator: prompts, decoding, log-probabilities, results."""
    engine = TorchGenerator(model, config=TorchEngine(slots=len(work)), stop_ids=frozenset(), decode=lambda tokens: "")
    for ticket in work:
        engine.add(ticket)
    rollouts: list[Rollout] = []
    while engine.ready:
        rollouts += engine.step()
    return rollouts


def transformers(model: PreTrainedModel, prompts: np.ndarray, longest: int) -> None:
    """The same as one batch, sampled until the longest is done."""
    ids = torch.from_numpy(prompts.astype(np.int64)).repeat_interleave(SAMPLES, dim=0)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=longest, use_cache=True
    )


def show(rows: list[dict[str, float | str]]) -> None:
    table = Table(title="Wanted tokens per second: median (lowest to highest)")
    for column in ("model", "tokens, longest", "ours", "transformers", "ratio", "logprob error"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        speeds = [
            f"{row[w]:,.0f} ({row[w + '_low']:,.0f} to {row[w + '_high']:,.0f})" for w in ("ours", "transformers")
        ]
        table.add_row(
            str(row["model"]),
            f"{row['tokens']:,}, {row['longest']}",
            *speeds,
            f"{row['ratio']:.1f}x",
            f"{row['logprob_error']:.1e}",
        )
    Console().print(table)
    for engine, title in (("vllm", "vLLM"), ("sglang", "SGLang")):
        if any(f"{engine}_float32" in row for row in rows):
            Console().print(_engine_table(rows, engine, title))


def _engine_table(rows: list[dict[str, float | str]], engine: str, title: str) -> Table:
    table = Table(title=f"{title}: the same work; an exchange of weights with all in flight; log-probabilities")
    for column in (
        "model, type",
        "tokens/s",
        "to ours",
        "stage",
        "apply (stall)",
        "until vetted",
        "mean, p99, max off",
    ):
        table.add_column(column, justify="left" if column == "model, type" else "right")
    for row in rows:
        for dtype in DTYPES:
            who = f"{engine}_{dtype}"
            speed, off = float(row[who]), [row[f"{who}_error_{what}"] for what in ("mean", "p99", "max")]
            table.add_row(
                f"{row['model']}, {dtype}",
                f"{speed:,.0f} ({row[who + '_low']:,.0f} to {row[who + '_high']:,.0f})",
                f"{speed / float(row['ours']):.2f}x",
                *(f"{1000 * float(row[f'{who}_{what}']):.0f} ms" for what in ("stage_s", "swap_s", "vet_s")),
                ", ".join(f"{value:.1e}" for value in off),
            )
    return table


def main(
    models: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}.")] = ",".join(CASES),
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of both.")] = 1,
    sglang: Annotated[str | None, typer.Option(help="An interpreter that has SGLang.")] = None,
    launcher: Annotated[str, typer.Option(help="What it runs.")] = "-m sglang.launch_server",
    options: Annotated[str, typer.Option(help="More arguments of SGLang's server.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Compare the torch generator with transformers' generate."""
    names = models.split(",")
    unknown = sorted(set(names) - set(CASES))
    if unknown:
        raise typer.BadParameter(
            f"got {', '.join(unknown)}, expected some of {', '.join(CASES)}", param_hint="--models"
        )
    server = sglang and SglangEngine(
        slots=GROUPS * SAMPLES,
        python=sglang,
        launcher=tuple(launcher.split()),
        options=tuple(options.split()),
        gpu_memory=0.5,
    )
    rows = run(names, repeats=repeats, threads=threads, sglang=server or None)
    show(rows)
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
