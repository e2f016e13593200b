"""The stored runs that the replay benchmark reads: random tokens in a log that `protocols.log` wrote, and their model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import Config, dump_config, parse_config
from protocols.log import GroupRow, Log
from protocols.messages import FLOAT, INT, Grade, Rollout
from tools.benchmarks.learner_batch import LONGEST, MEDIAN, PROMPT, SAMPLES, SIGMA, make_model
from workers.start import start_of

SMALL_VOCABULARY, SMALL_PROMPT, SMALL_RESPONSE = 64, 32, 128


def large_run(folder: Path, *, steps: int, groups: int, threads: int) -> Path:
    """SmolLM2-135M's shape, `steps` planned steps of `groups` groups with lognormal responses."""
    model = make_model("sdpa", threads)
    model.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(MEDIAN), SIGMA, steps * groups * SAMPLES), 1, LONGEST).astype(int)
    return _write(folder, lengths, steps=steps, prompt=PROMPT, vocabulary=model.config.vocab_size, threads=threads)


def small_run(folder: Path, *, steps: int, groups: int) -> Path:
    """A model that costs next to nothing, with much data in every step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SMALL_VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lengths = np.full(steps * groups * SAMPLES, SMALL_RESPONSE)
    return _write(folder, lengths, steps=steps, prompt=SMALL_PROMPT, vocabulary=SMALL_VOCABULARY, threads=1)


def run_config(folder: Path, *, steps: int, groups: int, threads: int) -> Config:
    """DAPO with micro-batches of 4096 positions."""
    data: dict[str, Any] = {
        "name": folder.name, "runs": str(folder.parent), "steps": steps,
        "model": {"type": "path", "path": str(folder / "model")}, "objective": {"type": "dapo"},
        "tasks": [{"type": "jsonl", "path": "rows.jsonl"}],
        "buffer": {"groups_per_step": groups, "samples_per_group": SAMPLES, "max_lag": steps},
        "generator": {"sampling": {"max_tokens": LONGEST}},
        "learner": {"lr": 1e-6, "token_budget": 4096, "device": "cpu", "threads": threads, "checkpoint_every": steps},
    }  # fmt: skip
    return parse_config(data, "benchmark")


def _write(folder: Path, lengths: np.ndarray, *, steps: int, prompt: int, vocabulary: int, threads: int) -> Path:
    random, groups = np.random.default_rng(1), len(lengths) // SAMPLES
    config = run_config(folder, steps=steps, groups=groups // steps, threads=threads)
    with Log.create(
        folder / "rollouts.db", run=folder.name, config=dump_config(config), code_version="benchmark",
        start=start_of(folder / "model"),
    ) as log:  # fmt: skip
        for group in range(groups):
            tokens = random.integers(1, vocabulary, prompt).astype(INT)
            log.add_group(
                GroupRow(
                    group=group, kind="train", source_index=group, task="rows", prompt_id=str(group), prompt=tokens,
                    prompt_text="", answer=json.dumps({"answer": ""}), samples=SAMPLES, seed=group, min_version=0,
                    issued_at=0.0,
                )
            )  # fmt: skip
            for sample in range(SAMPLES):
                _add(log, group, sample, random.integers(1, vocabulary, lengths[group * SAMPLES + sample]).astype(INT))
        for step, own in enumerate(np.split(np.arange(groups), steps), start=1):
            log.add_plan(step, own.tolist())
        log.commit()
    return folder


def _add(log: Log, group: int, sample: int, tokens: np.ndarray) -> None:
    """A response with text of its tokens' usual size, and its grade."""
    logprobs = np.full(len(tokens), -4.0, FLOAT)
    rollout = Rollout(
        group=group, sample=sample, fence=0, tokens=tokens, logprobs=logprobs, versions=[(0, len(tokens))],
        finish="stop", text="word" * len(tokens), started_at=0.0, finished_at=1.0,
    )  # fmt: skip
    log.add_rollout("benchmark", rollout, 1.0)
    right = sample % 3 == 0
    log.add_grade("benchmark", Grade(group, sample, 0, "graded", correct=right, reward=1.0 if right else -1.0), 2.0)
