"""One attention hook for every Hugging Face causal language model.

A model loaded with `attn_implementation=NAME` hands each layer's rotated queries and keys to the `attention` object
that its caller passed to `forward` as the keyword argument `ARGUMENT`. The learner passes a packed batch's block
structure, the generator its key-value slots; both lay all their tokens in one row of shape [1, N], so no linear layer
ever sees padding.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "headrace"
ARGUMENT = "headrace_attention"


class Attention(Protocol):
    """What a caller passes in: it decides which token attends to which."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, heads, N, d], key and value [1, kv_heads, N, d], of one row of N tokens -> [1, N, heads, d]."""


def _forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    attention: Attention = arguments[ARGUMENT]
    return attention.attend(cast("int", module.layer_idx), query, key, value, arguments["scaling"]), None


AttentionInterface.register(NAME, _forward)
