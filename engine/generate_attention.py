"""Attention of the generator's two kinds of forward pass; both get all their tokens as one row (see `engine.attention`).

`DecodeAttention`: one new token of every live sequence, over its prompt, shared within a group, and its own tokens.
`PrefillAttention`: stretches of prefixes, each over its own prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kv_slots import KvSlots, Prefix

_ROUND = 16
"""Attended lengths are multiples of this: kernels like aligned rows, and allocations repeat."""


class Sharing:
    """Which live sequence reads which prompt; made anew when a sequence starts or ends.

    `owner` int [N]: the prompt's slot. The queries of one prompt are laid side by side, `width` places a prompt: one
    product per prompt then serves all its samples.
    """

    def __init__(self, prompts: KvSlots, owner: np.ndarray) -> None:
        counts = np.bincount(owner, minlength=prompts.live)
        order = np.argsort(owner, kind="stable")
        self.prompts, self.width = prompts.live, int(counts.max())
        place = np.empty(len(owner), dtype=np.int64)
        place[order] = owner[order] * self.width + np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner[order]]
        rows = np.zeros(self.prompts * self.width, dtype=np.int64)  # unused places repeat row 0, nobody reads them
        rows[place] = np.arange(len(owner))
        self.place = torch.from_numpy(place).to(prompts.shape.device)
        self.rows = torch.from_numpy(rows).to(prompts.shape.device)
        self.kv = prompts.kv
        self.span = _span(prompts, prompts.lengths)
        self.mask = _mask(prompts, prompts.lengths, self.span)

    def gather(self, x: Tensor) -> Tensor:
        """[N, kv_heads, g, d] by sequence -> [prompts * kv_heads, width * g, d] by prompt."""
        _, kv_heads, group, d = x.shape
        wide = x.index_select(0, self.rows).view(self.prompts, self.width, kv_heads, group, d)
        return wide.transpose(1, 2).reshape(self.prompts * kv_heads, self.width * group, d)

    def scatter(self, x: Tensor, kv_heads: int) -> Tensor:
        """The way back."""
        d = x.shape[-1]
        wide = x.view(self.prompts, kv_heads, self.width, -1, d).transpose(1, 2)
        return wide.reshape(self.prompts * self.width, kv_heads, -1, d).index_select(0, self.place)


class DecodeAttention:
    """The newest token of each of the live sequences of `slots`, counted in their lengths already."""

    def __init__(self, slots: KvSlots, sharing: Sharing, ends: Sequence[int]) -> None:
        """`ends`: where ranges of slots end that attend together, each as far as its longest sequence."""
        device = slots.shape.device
        self._kv, self._sharing = slots.kv, sharing
        self._rows = torch.arange(slots.live, device=device)
        self._at = torch.from_numpy(slots.lengths - 1).to(device)
        self._ranges: list[tuple[int, int, int, Tensor]] = []
        bounds = [0, *(end for end in ends if end < slots.live), slots.live]
        for start, end in pairwise(bounds):
            lengths = slots.lengths[start:end]
            span = _span(slots, lengths)
            self._ranges.append((start, end, span, _mask(slots, lengths, span)))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Stores the new keys and values, then attends: one softmax over the scores of the prompt and of the own tokens.

        Query heads that share a key head are rows of one product, so each key is read once.
        """
        _, kv_heads, live, d = key.shape
        keys, values = self._kv[layer, 0], self._kv[layer, 1]
        keys[self._rows, :, self._at] = key[0].transpose(0, 1)
        values[self._rows, :, self._at] = value[0].transpose(0, 1)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        queries = query[0].transpose(0, 1).reshape(live, kv_heads, -1, d)
        prompt_scores = self._prompt_scores(layer, queries, scale)
        attended, prompt_weights = [], []
        for start, end, span, mask in self._ranges:
            rows = slice(start * kv_heads, end * kv_heads)
            own = torch.baddbmm(
                mask, queries[start:end].flatten(0, 1), keys[rows, :span].transpose(1, 2), alpha=scale
            ).view(end - start, kv_heads, -1, span)
            scores = torch.cat([prompt_scores[start:end], own], dim=-1)
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
            attended.append(torch.bmm(weights[..., -span:].flatten(0, 1), values[rows, :span]))
            prompt_weights.append(weights[..., :-span])
        own_part = torch.cat(attended).view(queries.shape)
        return (own_part + self._prompt_values(layer, torch.cat(prompt_weights))).view(1, live, -1, d)

    def _prompt_scores(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        sharing, kv_heads = self._sharing, queries.shape[1]
        keys = sharing.kv[layer, 0].flatten(0, 1)[: sharing.prompts * kv_heads, : sharing.span]
        scores = torch.baddbmm(sharing.mask, sharing.gather(queries), keys.transpose(1, 2), alpha=scale)
        return sharing.scatter(scores, kv_heads)

    def _prompt_values(self, layer: int, weights: Tensor) -> Tensor:
        sharing, kv_heads = self._sharing, weights.shape[1]
        values = sharing.kv[layer, 1].flatten(0, 1)[: sharing.prompts * kv_heads, : sharing.span]
        return sharing.scatter(torch.bmm(sharing.gather(weights), values), kv_heads)


class PrefillAttention:
    """Stretches of several prefixes in one row: `count` tokens of each prefix from its `done` on, in the given order.

    No stretch sees another; each sees its own prefix. A loop over stretches costs less than one pass with a block
    mask, which computes what it masks.
    """

    def __init__(self, stretches: Sequence[tuple[Prefix, int]]) -> None:
        self._stretches = [(prefix, count, _continuation_mask(prefix, count)) for prefix, count in stretches]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Stores the keys and values of the row's tokens in their prefixes, then attends."""
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


def _span(slots: KvSlots, lengths: np.ndarray) -> int:
    """How many positions to attend to so that the longest is covered; at least one, so that no tensor is empty."""
    return min(math.ceil(max(1, int(lengths.max())) / _ROUND) * _ROUND, int(slots.kv.shape[-2]))


def _mask(slots: KvSlots, lengths: np.ndarray, span: int) -> Tensor:
    """[slots * kv_heads, 1, span]: 0 on the first `lengths` positions of each, minus infinity beyond."""
    shape = slots.shape
    beyond = np.arange(span) >= np.repeat(lengths, shape.kv_heads)[:, None, None]
    mask = torch.from_numpy(np.where(beyond, np.float32(-math.inf), np.float32(0.0)))
    return mask.to(device=shape.device, dtype=shape.dtype)


def _continuation_mask(prefix: Prefix, count: int) -> Tensor | None:
    """None where plain causal attention is right; else what `count` tokens after `prefix.done` others must not see."""
    if prefix.done == 0:
        return None
    end, kv = prefix.done + count, prefix.kv
    position = torch.arange(end, device=kv.device)
    beyond = position[None, :] > position[prefix.done :, None]
    return torch.zeros(beyond.shape, dtype=kv.dtype, device=kv.device).masked_fill_(beyond, -math.inf)
