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

import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from msgspec import Struct, to_builtins
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.advantages import group_advantages
from engine.attention import NAME
from engine.config import Config, parse_config
from engine.learn_torch import TorchLearner
from engine.logprobs import token_logprobs
from protocols.messages import BOOL, FLOAT, INT, Batch

SAMPLES, PROMPT = 8, 256
MEDIAN, SIGMA, LONGEST = 128, 0.7, 512
DRIFT = 0.1
"""Standard deviation of the old log-probabilities from the policy's: ratios differ from 1 and some are clipped."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
TIMEOUT_S = 900.0
SIDES = ("ours", "trl")
MISSING = "trl is not installed, so only our own side is measured; to compare: pip install -e '.[bench]'"

Row = dict[str, float | str]


class Measured(Struct, frozen=True):
    """One process's figures: wall and processor seconds, temporary bytes at the peak, loss, gradient norm."""

    seconds: float
    cpu_seconds: float
    peak_bytes: float
    loss: float
    grad_norm: float


def run(*, groups: int, repeats: int, threads: int, checkpointing: list[bool]) -> list[Row]:
    """One row for each of `checkpointing`: medians, lowest and highest of both sides, their ratios."""
    sides = SIDES if importlib.util.find_spec("trl") else SIDES[:1]
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "old_logprobs.npy"
        _in_process(store_old, groups, threads, str(stored))
        return [measure(groups, repeats, threads, str(stored), sides, layers) for layers in checkpointing]


def measure(groups: int, repeats: int, threads: int, stored: str, sides: tuple[str, ...], checkpointing: bool) -> Row:
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            got = _in_process(MEASURES[side], groups, threads, stored, checkpointing)
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


# --- the model and the batch, the same in every process -----------------------------------------------------------


def make_model(attention: str, threads: int) -> PreTrainedModel:
    """SmolLM2-135M's shape with random weights: 134,515,008 parameters, output tied to the input."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def response_lengths(groups: int) -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), SIGMA, groups * SAMPLES)
    return np.clip(drawn, 1, LONGEST).astype(INT)


def make_batch(groups: int, old: np.ndarray | None = None) -> Batch:
    """The stored batch: random tokens, and in every group both right and wrong responses."""
    random, lengths = np.random.default_rng(1), response_lengths(groups)
    tokens, responses = int(lengths.sum()), len(lengths)
    correct = np.tile(np.arange(SAMPLES) % 3 == 0, groups)
    return Batch(
        step=1,
        groups=np.arange(groups, dtype=INT),
        prompt_lengths=np.full(groups, PROMPT, INT),
        prompts=random.integers(1, 49_152, groups * PROMPT).astype(INT),
        sizes=np.full(groups, SAMPLES, INT),
        lengths=lengths,
        tokens=random.integers(1, 49_152, tokens).astype(INT),
        logprobs=np.zeros(tokens, FLOAT) if old is None else old,
        versions=np.zeros(tokens, INT),
        rewards=np.where(correct, 1, -1).astype(FLOAT),
        correct=correct.astype(BOOL),
        truncated=np.zeros(responses, BOOL),
    )


def store_old(groups: int, threads: int, stored: str) -> None:
    """The old policy's log-probabilities: those of the plain model, one response after another, with a seeded deviation."""
    model, batch = make_model("sdpa", threads).eval(), make_batch(groups)
    pieces: list[np.ndarray] = []
    with torch.no_grad():
        for index, response in enumerate(np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])):
            first = index // SAMPLES * PROMPT
            row = torch.from_numpy(np.concatenate([batch.prompts[first : first + PROMPT], response]).astype(np.int64))
            hidden = model.model(input_ids=row[None]).last_hidden_state[0, PROMPT - 1 : -1]
            pieces.append(token_logprobs(hidden, model.lm_head.weight, row[PROMPT:])[0].numpy())
    exact = np.concatenate(pieces)
    np.save(stored, np.minimum(exact + DRIFT * np.random.default_rng(2).standard_normal(len(exact)), 0).astype(FLOAT))


# --- the two sides, each in a process of its own --------------------------------------------------------------------


def measure_ours(groups: int, threads: int, stored: str, checkpointing: bool) -> Measured:
    batch = make_batch(groups, np.load(stored))
    learner = TorchLearner(_config(groups, batch, checkpointing), make_model(NAME, threads))
    for tensor in (learner.optimizer.gradient, *learner.optimizer.state().values()):
        tensor.zero_()  # makes its pages resident
    return _measured(lambda: _step(learner, batch))


def _step(learner: TorchLearner, batch: Batch) -> Callable[[], tuple[float, float]]:
    metrics = learner.step(1, [batch])
    return lambda: (metrics["loss"], _norm(list(learner.optimizer.views.values())))


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


def measure_trl(groups: int, threads: int, stored: str, checkpointing: bool) -> Measured:
    batch, model = make_batch(groups, np.load(stored)), make_model("sdpa", threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, groups, folder)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trainer.current_gradient_accumulation_steps = groups
    inputs = _trl_inputs(batch)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).zero_()
    return _measured(lambda: _compute_loss(trainer, model, inputs))


def _compute_loss(
    trainer: Any, model: PreTrainedModel, inputs: list[dict[str, Tensor]]
) -> Callable[[], tuple[float, float]]:
    total = 0.0
    for micro_batch in inputs:
        loss = trainer.compute_loss(model, micro_batch)
        loss.backward()
        total += loss.item()
    return lambda: (total, _norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None]))


def _trainer(model: PreTrainedModel, groups: int, folder: str) -> Any:
    """A `GRPOTrainer` that has all it asks for; of data, tokenizer and reward nothing is used here."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    tokenizers, transformers = importlib.import_module("tokenizers"), importlib.import_module("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    settings = trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, loss_type="dapo", beta=0.0, epsilon=CLIP_LOW,
        epsilon_high=CLIP_HIGH, per_device_train_batch_size=SAMPLES, num_generations=SAMPLES,
        gradient_accumulation_steps=groups, max_completion_length=LONGEST, gradient_checkpointing=False, report_to=[],
    )  # fmt: skip
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"prompt": ""}] * SAMPLES * groups),
        processing_class=tokenizer,
    )


def _trl_inputs(batch: Batch) -> list[dict[str, Tensor]]:
    """One dict a group, as the trainer makes them from rollouts: completions padded on the right."""
    group_of = torch.arange(len(batch.lengths)) // SAMPLES
    advantages = group_advantages(torch.tensor(batch.rewards), group_of)
    ends, inputs = np.cumsum(batch.lengths), []
    for group in range(len(batch.sizes)):
        chosen = range(group * SAMPLES, (group + 1) * SAMPLES)
        spans = [slice(int(ends[i] - batch.lengths[i]), int(ends[i])) for i in chosen]
        prompt = torch.from_numpy(batch.prompts[group * PROMPT : (group + 1) * PROMPT].astype(np.int64))
        inputs.append(
            {
                "prompt_ids": prompt.expand(SAMPLES, PROMPT).contiguous(),
                "prompt_mask": torch.ones(SAMPLES, PROMPT, dtype=torch.int64),
                "completion_ids": _padded([batch.tokens[span].astype(np.int64) for span in spans]),
                "completion_mask": _padded([np.ones(span.stop - span.start, np.int64) for span in spans]),
                "advantages": advantages[group * SAMPLES : (group + 1) * SAMPLES],
                "old_per_token_logps": _padded([batch.logprobs[span] for span in spans]),
                "num_items_in_batch": torch.tensor(len(batch.tokens)),
            }
        )
    return inputs


def _norm(gradients: list[Tensor]) -> float:
    """In float64: over 135M numbers float32 is off by a percent."""
    return float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5


def _padded(rows: list[np.ndarray]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


MEASURES: dict[str, Callable[[int, int, str, bool], Measured]] = {"ours": measure_ours, "trl": measure_trl}


def _measured(work: Callable[[], Callable[[], tuple[float, float]]]) -> Measured:
    """`work` does what is measured, and gives back how to find the loss and the gradient norm after that."""
    resident = psutil.Process().memory_info().rss
    peak_before = _peak_bytes()
    cpu, began = time.process_time(), time.perf_counter()
    result = work()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    peak = _peak_bytes()
    if peak <= peak_before:
        raise RuntimeError(f"benchmark: a peak of {peak} bytes, expected more than {peak_before}, that of the set-up")
    loss, grad_norm = result()
    return Measured(seconds, cpu_seconds, peak - resident, loss, grad_norm)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a new process. Raises RuntimeError when it fails or takes longer than `TIMEOUT_S`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=[theirs, function, *arguments], daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_S):
            raise RuntimeError(f"benchmark: {function.__name__}: no result within {TIMEOUT_S:.0f} s")
        return ours.recv()
    except EOFError:
        process.join(TIMEOUT_S)
        raise RuntimeError(f"benchmark: {function.__name__}: its process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _answer(results: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    results.send(function(*arguments))


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
