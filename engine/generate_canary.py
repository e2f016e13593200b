"""What an engine must compute: a fixed short prompt's log-probabilities by our own forward pass on the weights that came.

vLLM keeps packed copies of weights that a reload may leave as they were, without any error: on a CPU the output layer of a
model with tied embeddings is such a copy (vLLM 0.32). SGLang reports success for weights whose name it does not know (0.5.20
to 0.5.23). So no token of new weights is served before the engine's own answer to the canary prompt agrees with this one.
The forward pass is the one that the learner trains with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.adopt_weights import WeightsRefused, check_weights
from engine.generate_stage import Stage
from engine.logprobs import token_logprobs
from engine.models import hidden_states, load_model, named_weights, output_weight
from engine.packed_attention import PackedAttention

PROMPT_TOKENS = 24
TEMPERATURE = 0.7
"""At which the one token is drawn that the engine gives: whether it scales before it takes log-probabilities shows only
away from 1."""
TOLERANCE = {"float32": 2e-3, "bfloat16": 1.0}
"""Nats by which any token of the canary may differ between the engine's forward pass and ours."""


class Expected(NamedTuple):
    """The prompt's tokens' log-probabilities but the first's, float32 [n - 1], and those of every token that may follow, at
    `TEMPERATURE`, float32 [V]."""

    prompt: np.ndarray
    following: np.ndarray

    def difference(self, prompt: np.ndarray, token: int, logprob: float) -> float:
        """The largest in nats; NaN when a number is none."""
        of_prompt = np.abs(prompt - self.prompt).max()
        return float(np.maximum(of_prompt, abs(logprob - self.following[token])))


class Canary:
    """The policy's architecture on the CPU, its parameters lying in the `stage` that the engine takes them from."""

    def __init__(self, folder: Path, dtype: str) -> None:
        """Raises `ConfigError` for a folder that is no model of ours."""
        self.model = load_model(folder, dtype=dtype, device="cpu", weights=False)
        self.stage = Stage.create(named_weights(self.model))
        for name, parameter in named_weights(self.model).items():
            parameter.data = self.stage.tensors[name]
        self.vocabulary = int(output_weight(self.model).shape[0])
        self.context = int(self.model.config.max_position_embeddings)
        tokens = min(PROMPT_TOKENS, self.context - 1)
        self.prompt = [(7919 * place + 13) % self.vocabulary for place in range(tokens)]
        self.tolerance = TOLERANCE[dtype]

    @torch.inference_mode()
    def fill(self, weights: Mapping[str, Tensor], version: int) -> Expected:
        """Stage `weights`; what the engine must answer then.

        Raises `WeightsRefused`, with nothing staged, for other names or shapes and for types that are no floating-point
        numbers of 16 bits or more, and `FloatingPointError` for weights that give no numbers.
        """
        check_weights(self.stage.tensors, weights, version)
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                served = self.stage.tensors[name].dtype
                raise WeightsRefused(
                    f"weights of version {version}: {name} is {tensor.dtype}, the engine serves {served}"
                )
        self.stage.fill(weights)
        expected = self.expected()
        if not all(np.isfinite(values).all() for values in expected):
            raise FloatingPointError(f"generator: weights of version {version} give logits that are not finite")
        return expected

    @torch.inference_mode()
    def expected(self) -> Expected:
        """The answer under what is staged."""
        ids = torch.tensor(self.prompt)
        attention = PackedAttention(np.array([[0, len(ids), 0, 0]]), "cpu")
        hidden = hidden_states(self.model, ids, torch.arange(len(ids)), attention)
        of_prompt = token_logprobs(hidden[:-1], output_weight(self.model), ids[1:])[0].float()
        logits = (hidden[-1] @ output_weight(self.model).T).float()
        return Expected(of_prompt.numpy(), torch.log_softmax(logits / TEMPERATURE, -1).numpy())
