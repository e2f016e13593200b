"""The peer of the learner benchmark: the loss and backward of TRL's `GRPOTrainer` on the stored batch."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.advantages import group_advantages
from protocols.messages import Batch
from tools.benchmarks.learner_batch import CLIP_HIGH, CLIP_LOW, LONGEST, PROMPT, SAMPLES, make_batch, make_model
from tools.benchmarks.learner_process import Measured, measured, norm


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
    return measured(lambda: _compute_loss(trainer, model, inputs))


def _compute_loss(
    trainer: Any, model: PreTrainedModel, inputs: list[dict[str, Tensor]]
) -> Callable[[], tuple[float, float]]:
    total = 0.0
    for micro_batch in inputs:
        loss = trainer.compute_loss(model, micro_batch)
        loss.backward()
        total += loss.item()
    return lambda: (total, norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None]))


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


def _padded(rows: list[np.ndarray]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
