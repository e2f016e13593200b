"""The model and the batch of the learner benchmark, the same in every process that measures."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from engine.logprobs import token_logprobs
from protocols.messages import BOOL, FLOAT, INT, Batch

SAMPLES, PROMPT = 8, 256
MEDIAN, SIGMA, LONGEST = 128, 0.7, 512
DRIFT = 0.1
"""Standard deviation of the old log-probabilities from the policy's: ratios differ from 1 and some are clipped."""
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


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
