"""Keys and values of running sequences: fixed slots, the live ones always first, so that attention reads views.

One tensor [layers, 2, slots, kv_heads, capacity, d] holds them all. A prompt is computed once, into a `Prefix`, and
copied into the slots of its samples. `DecodeAttention` and `PrefillAttention` are what a forward pass of one row of
tokens is given (see `engine.attention`): the first for one token of every live slot, the second for stretches of prefixes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

GROWTH = 128
"""Tokens by which the capacity of all slots grows."""
_ROUND = 16
"""Attended lengths are multiples of this: kernels like aligned rows, and allocations repeat."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's keys and values take: [layers, 2, kv_heads, d] of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> KvShape:
        """From a Hugging Face config of the Llama and Qwen families."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim, dtype, device)

    def zeros(self, *slots: int, tokens: int) -> Tensor:
        """[layers, 2, *slots, kv_heads, tokens, d]. Zeros: a masked position may hold anything but NaN or infinity."""
        shape = (self.layers, 2, *slots, self.kv_heads, tokens, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)


class Prefix:
    """The first tokens of a sequence and, as far as they are computed, their keys and values."""

    def __init__(self, shape: KvShape, ids: np.ndarray, start: Prefix | None = None) -> None:
        """`ids` int32 [n]; `start`, complete, covers the first of them."""
        self.ids = ids
        self.kv = shape.zeros(tokens=len(ids))
        self.done = 0
        self._used = False
        if start is not None:
            self.done = len(start.ids)
            self.kv[..., : self.done, :] = start.kv

    @property
    def left(self) -> int:
        """Tokens still to be computed."""
        return len(self.ids) - self.done

    def use(self) -> int:
        """Tokens that this use of it saves: none the first time, afterwards all."""
        saved = len(self.ids) if self._used else 0
        self._used = True
        return saved


class KvSlots:
    """The slots' keys and values; which slots are live, and how long they are, is the caller's knowledge."""

    def __init__(self, shape: KvShape, slots: int) -> None:
        self.shape, self.slots = shape, slots
        self.kv = shape.zeros(slots, tokens=0)

    @property
    def capacity(self) -> int:
        """Tokens that a slot has room for now."""
        return int(self.kv.shape[-2])

    def reserve(self, tokens: int, live: int) -> None:
        """Room for `tokens` in every slot; what the first `live` slots hold stays."""
        if tokens <= self.capacity:
            return
        old, kept = self.kv, self.capacity
        self.kv = self.shape.zeros(self.slots, tokens=math.ceil(tokens / GROWTH) * GROWTH)
        self.kv[:, :, :live, :, :kept] = old[:, :, :live]

    def fill(self, slot: int, prefix: Prefix) -> None:
        """Copy a complete prefix into a slot that has room for it."""
        self.kv[:, :, slot, :, : len(prefix.ids)] = prefix.kv

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` of one slot into another."""
        self.kv[:, :, target, :, :tokens] = self.kv[:, :, source, :, :tokens]


class DecodeAttention:
    """One new token for each of the first N slots, which hold `lengths` int64 [N] tokens before it."""

    def __init__(self, slots: KvSlots, lengths: np.ndarray) -> None:
        device = slots.shape.device
        self._kv = slots.kv
        self._live = len(lengths)
        self._rows = torch.arange(self._live, device=device)
        self._at = torch.from_numpy(lengths).to(device)
        self._span = min(math.ceil((int(lengths.max()) + 1) / _ROUND) * _ROUND, slots.capacity)
        beyond = torch.arange(self._span, device=device) > self._at[:, None]
        mask = torch.zeros(beyond.shape, dtype=slots.shape.dtype, device=device).masked_fill_(beyond, -math.inf)
        self._mask = mask[:, None, None, :]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Stores the new keys and values, then attends. Query heads that share a key head lie along the query-length
        axis, so each key is read once."""
        kv_heads, head_dim = key.shape[1], key.shape[3]
        keys, values = self._kv[layer, 0], self._kv[layer, 1]
        keys[self._rows, :, self._at] = key[0].transpose(0, 1)
        values[self._rows, :, self._at] = value[0].transpose(0, 1)
        queries = query[0].transpose(0, 1).reshape(self._live, kv_heads, -1, head_dim)
        attended = F.scaled_dot_product_attention(
            queries,
            keys[: self._live, :, : self._span],
            values[: self._live, :, : self._span],
            attn_mask=self._mask.expand(-1, -1, queries.shape[2], -1),
            scale=scale,
        )
        return attended.reshape(1, self._live, -1, head_dim)


class PrefillAttention:
    """Stretches of several prefixes in one row: `count` tokens of each prefix from its `done` on, in the given order.

    No stretch sees another; each sees its own prefix. A loop over stretches costs less than one pass with a block
    mask, which computes what it masks.
    """

    def __init__(self, stretches: Sequence[tuple[Prefix, int]]) -> None:
        self._stretches = [(prefix, count, _continuation_mask(prefix, count)) for prefix, count in stretches]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], key.shape[3]
        attended, first = torch.empty_like(query[0].transpose(0, 1)), 0
        for prefix, count, mask in self._stretches:
            row, end = slice(first, first + count), prefix.done + count
            keys, values = prefix.kv[layer, 0, :, :end], prefix.kv[layer, 1, :, :end]
            keys[:, prefix.done :], values[:, prefix.done :] = key[0, :, row], value[0, :, row]
            # Key heads as the batch, the query heads of each along the head axis: the expanded keys are not copied.
            shared = (kv_heads, heads // kv_heads, end, head_dim)
            out = F.scaled_dot_product_attention(
                query[0, :, row].reshape(kv_heads, -1, count, head_dim),
                keys[:, None].expand(shared),
                values[:, None].expand(shared),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
            )
            attended[row] = out.reshape(heads, count, head_dim).transpose(0, 1)
            first += count
        return attended[None]


def _continuation_mask(prefix: Prefix, count: int) -> Tensor | None:
    """None where plain causal attention is right; else what `count` tokens after `prefix.done` others must not see."""
    if prefix.done == 0:
        return None
    end, kv = prefix.done + count, prefix.kv
    position = torch.arange(end, device=kv.device)
    beyond = position[None, :] > position[prefix.done :, None]
    return torch.zeros(beyond.shape, dtype=kv.dtype, device=kv.device).masked_fill_(beyond, -math.inf)
