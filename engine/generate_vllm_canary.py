"""What vLLM must compute: a fixed short prompt's log-probabilities by our own forward pass on the weights that came.

vLLM keeps packed copies of weights that a reload may leave as they were, without any error: on a CPU the output layer of a
model with tied embeddings is such a copy (vLLM 0.32). So no token of new weights is served before vLLM's own answer to the
canary prompt agrees with this one. The forward pass is the one that the learner trains with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.adopt_weights import WeightsRefused, check_weights
from engine.generate_vllm_stage import Stage
from engine.logprobs import token_logprobs
from engine.models import hidden_states, load_model, named_weights, output_weight
from engine.packed_attention import PackedAttention

PROMPT_TOKENS = 24
TOLERANCE = {"float32": 2e-3, "bfloat16": 1.0}
"""Nats by which any token of the canary may differ between vLLM's forward pass and ours."""


class Canary:
    """The policy's architecture on the CPU, its parameters lying in the `stage` that vLLM's workers load from."""

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
    def fill(self, weights: Mapping[str, Tensor], version: int) -> np.ndarray:
        """Stage `weights`; what each token of the prompt but the first must get: float32 [n - 1].

        Raises `WeightsRefused`, with nothing staged, for other names or shapes and for types that are no floating-point
        numbers of 16 bits or more, and `FloatingPointError` for weights that give no numbers.
        """
        check_weights(self.stage.tensors, weights, version)
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                served = self.stage.tensors[name].dtype
                raise WeightsRefused(f"weights of version {version}: {name} is {tensor.dtype}, vLLM serves {served}")
        self.stage.fill(weights)
        expected = self.logprobs()
        if not np.isfinite(expected).all():
            raise FloatingPointError(f"generator: weights of version {version} give logits that are not finite")
        return expected

    @torch.inference_mode()
    def logprobs(self) -> np.ndarray:
        """The prompt's log-probabilities under what is staged."""
        ids = torch.tensor(self.prompt)
        attention = PackedAttention(np.array([[0, len(ids), 0, 0]]), "cpu")
        hidden = hidden_states(self.model, ids, torch.arange(len(ids)), attention)
        return token_logprobs(hidden[:-1], output_weight(self.model), ids[1:])[0].float().numpy()
