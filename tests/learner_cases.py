"""Batches, tiny models and configs for the tests of the learner's parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import engine.attention
from engine.config import Config, parse_config
from engine.models import named_weights
from protocols.messages import BOOL, FLOAT, INT, Batch

VOCABULARY = 61
GROUPS = [(5, [3, 1, 9, 2]), (1, [1, 4]), (12, [2, 20, 4, 7]), (3, [1, 1])]
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 8}),
}


def tiny_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config, model, extra = KINDS[kind]
    torch.manual_seed(7)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1,
        "attn_implementation": engine.attention.NAME,
    }  # fmt: skip
    return model(config(**settings, **extra)).to(dtype).eval()


def tiny_critic() -> PreTrainedModel:
    """A critic of the Llama's size, with a head that is not zero."""
    torch.manual_seed(11)
    critic = LlamaForTokenClassification(
        tiny_model().config.__class__(**tiny_model().config.to_dict() | {"num_labels": 1})
    )
    critic.set_attn_implementation(engine.attention.NAME)
    return critic.eval()


def make_batch(groups: list[tuple[int, list[int]]], *, seed: int = 0, step: int = 1, **columns: np.ndarray) -> Batch:
    """Random tokens for groups of (prompt length, response lengths); rewards are +-1, all tokens of version `step - 1`."""
    random = np.random.default_rng(seed)
    prompts, lengths = [prompt for prompt, _ in groups], [length for _, own in groups for length in own]
    tokens, responses = sum(lengths), len(lengths)
    correct = random.random(responses) < 0.5
    made: dict[str, Any] = {
        "groups": np.arange(len(groups), dtype=INT),
        "prompt_lengths": np.array(prompts, INT),
        "prompts": random.integers(0, VOCABULARY, sum(prompts)).astype(INT),
        "sizes": np.array([len(own) for _, own in groups], INT),
        "lengths": np.array(lengths, INT),
        "tokens": random.integers(0, VOCABULARY, tokens).astype(INT),
        "logprobs": (-4 - random.random(tokens)).astype(FLOAT),
        "versions": np.full(tokens, step - 1, INT),
        "rewards": np.where(correct, 1, -1).astype(FLOAT),
        "correct": correct.astype(BOOL),
        "truncated": np.zeros(responses, BOOL),
    }
    return Batch(step=step, **made | columns)


def select(batch: Batch, groups: list[int]) -> Batch:
    """The batch of some of its groups only."""
    group_of_response = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
    group_of_token = np.repeat(group_of_response, batch.lengths)
    group_of_prompt = np.repeat(np.arange(len(batch.sizes)), batch.prompt_lengths)
    by = {
        "groups": np.arange(len(batch.sizes)), "prompt_lengths": np.arange(len(batch.sizes)),
        "sizes": np.arange(len(batch.sizes)), "prompts": group_of_prompt, "tokens": group_of_token,
        "logprobs": group_of_token, "versions": group_of_token, "lengths": group_of_response,
        "rewards": group_of_response, "correct": group_of_response, "truncated": group_of_response,
    }  # fmt: skip
    columns = {name: getattr(batch, name)[np.isin(index, groups)] for name, index in by.items()}
    return Batch(step=batch.step, **columns)


def make_config(
    *,
    objective: dict | None = None,
    max_lag: int = 1,
    temperature: float = 1.0,
    critic: dict | None = None,
    **learner: Any,
) -> Config:
    data = {
        "name": "test",
        "steps": 10,
        "model": {"type": "new", "alphabet": "0123456789"},
        "tasks": [],
        "objective": {"type": "dapo"} | (objective or {}),
        "buffer": {"groups_per_step": 4, "max_lag": max_lag},
        "generator": {"sampling": {"max_tokens": 64, "temperature": temperature}},
        "learner": {"lr": 1e-2} | learner,
    }
    if critic is not None:
        data["critic"] = {"lr": 1e-2} | critic
    return parse_config(data, "test")


def responses_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, response) of each response."""
    prompts = np.split(batch.prompts, np.cumsum(batch.prompt_lengths)[:-1])
    responses = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
    groups = np.repeat(np.arange(len(batch.sizes)), batch.sizes)
    return [(prompts[group], response) for group, response in zip(groups, responses, strict=True)]


def padded_logprobs(model: PreTrainedModel, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """[N] log-probabilities of the batch's tokens the plain way: prompts repeated, sequences padded, eager attention."""
    pairs, ids, mask = padded(batch)
    model.set_attn_implementation("eager")
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float() / temperature
    model.set_attn_implementation(engine.attention.NAME)
    logp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([logp[row, len(p) - 1 : len(p) + len(r) - 1] for row, (p, r) in enumerate(pairs)])


def padded_values(critic: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """[N] values of the states before the batch's tokens, the plain way."""
    pairs, ids, mask = padded(batch)
    critic.set_attn_implementation("eager")
    values = critic(input_ids=ids, attention_mask=mask, use_cache=False).logits[..., 0]
    critic.set_attn_implementation(engine.attention.NAME)
    return torch.cat([values[row, len(p) - 1 : len(p) + len(r) - 1] for row, (p, r) in enumerate(pairs)])


def padded(batch: Batch) -> tuple[list[tuple[np.ndarray, np.ndarray]], torch.Tensor, torch.Tensor]:
    """(prompt, response) pairs, and their token ids and mask [responses, longest]."""
    pairs = responses_of(batch)
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    ids, mask = torch.zeros(len(pairs), longest, dtype=torch.long), torch.zeros(len(pairs), longest, dtype=torch.long)
    for row, (prompt, response) in enumerate(pairs):
        both = torch.from_numpy(np.concatenate([prompt, response]))
        ids[row, : len(both)], mask[row, : len(both)] = both, 1
    return pairs, ids, mask


def near_policy(batch: Batch, seed: int = 5) -> Batch:
    """The batch with behaviour log-probabilities about those of the tiny model, so that ratios are around 1."""
    noise = np.random.default_rng(seed).normal(scale=0.3, size=len(batch.tokens))
    logp = padded_logprobs(tiny_model(), batch).detach().numpy() + noise
    columns = {name: getattr(batch, name) for name in batch.__struct_fields__}
    return Batch(**columns | {"logprobs": np.minimum(logp, 0).astype(np.float32)})


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
