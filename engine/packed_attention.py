"""Attention within a packed row: each response attends to its group's prompt and causally to itself.

Linear layers see the row without padding; only here are queries and keys laid out in padded blocks [S, Lq] and [S, Lk],
so that `scaled_dot_product_attention` runs its fused kernels. Segments of like lengths share a block, and a prompt's keys
are repeated for each of its responses, one block at a time.

The layouts are not kept for the backward pass: only the row's own queries, keys and values are, and the blocks are made
again. That costs one more attention forward pass and saves what autograd would hold of every layer: padded copies, with
every prompt's keys and values once a response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 1024
"""Longer segments are cut into pieces of this many queries, which bounds a block's mask."""
MAX_AREA = 1 << 24
"""Query-key pairs of a block, when it has several pieces."""
MAX_KEYS = 1 << 16
"""Key slots of a block, when it has several pieces."""
WASTE = 1.25
FREE_AREA = 1 << 14
"""A block may have WASTE times the query-key pairs that its pieces need, plus FREE_AREA: what one more kernel call costs."""


@dataclass(frozen=True)
class Block:
    """S pieces of segments, padded to [S, Lq] queries and [S, Lk] keys.

    `query_at` [S * Lq] and `key_at` [S * Lk] are positions of the row; padding repeats some position. `real` [Q] are the
    query slots that are not padding, `rows` [Q] their positions, `padding` the other slots. Query i of piece s sees its
    keys 0 to i + `offset`[s]: all real keys up to itself, and never padding unless it is padding.
    """

    pieces: int
    queries: int
    keys: int
    query_at: Tensor
    key_at: Tensor
    real: Tensor
    rows: Tensor
    padding: Tensor
    offset: Tensor

    def mask(self) -> Tensor:
        """[S, 1, Lq, Lk], True where the query may see the key."""
        device = self.offset.device
        last = torch.arange(self.queries, device=device)[:, None] + self.offset[:, None, None]
        return (torch.arange(self.keys, device=device) <= last)[:, None]


class PackedAttention:
    """The `Attention` of one packed row.

    `segments` int [K, 4] of (start, length, prefix start, prefix length): the positions from start on attend to the whole
    prefix and causally to their own segment. Every position of the row belongs to exactly one segment.
    """

    def __init__(self, segments: np.ndarray, device: torch.device | str) -> None:
        pieces = _pieces(segments)
        self.blocks = [_block(pieces[chosen], device) for chosen in _cut(pieces)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query [1, heads, N, d], key and value [1, kv_heads, N, d] -> [1, N, heads, d]."""
        rows = (x[0].transpose(0, 1) for x in (query, key, value))
        output: Tensor = _Attend.apply(*rows, self.blocks, scale)
        return output[None]


class _Attend(torch.autograd.Function):
    """query [N, heads, d], key and value [N, kv_heads, d] -> [N, heads, d]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        output = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for block in blocks:
            laid_out = _attention(_lay_out(block, query, key, value), block, scale)
            slots = laid_out.transpose(1, 2).reshape(-1, output.shape[1])
            output.index_copy_(0, block.rows, slots.index_select(0, block.real))
        return output.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        flat = gradients[0].reshape(query.shape[0], -1)
        query_gradient = torch.empty_like(flat)
        # A prompt's keys gather the gradients of all its responses: summed in fp32.
        key_gradient = torch.zeros(key.shape[0], key[0].numel(), dtype=torch.float32, device=key.device)
        value_gradient = torch.zeros_like(key_gradient)
        for block in ctx.blocks:
            inputs = [x.requires_grad_() for x in _lay_out(block, query, key, value)]
            # Padding queries must send nothing back; padding keys then get exactly 0.
            slots = flat.index_select(0, block.query_at).index_fill_(0, block.padding, 0.0)
            slots = slots.view(block.pieces, block.queries, *query.shape[1:]).transpose(1, 2)
            with torch.enable_grad():
                output = _attention(inputs, block, ctx.scale)
            for_query, for_key, for_value = (
                x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3])
                for x in torch.autograd.grad(output, inputs, slots)
            )
            query_gradient.index_copy_(0, block.rows, for_query.index_select(0, block.real))
            key_gradient.index_add_(0, block.key_at, for_key.float())
            value_gradient.index_add_(0, block.key_at, for_value.float())
        return (
            query_gradient.view(query.shape),
            key_gradient.to(key.dtype).view(key.shape),
            value_gradient.to(value.dtype).view(value.shape),
            None,
            None,
        )


def _lay_out(block: Block, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Rows [N, heads, d] to the block's [S, heads, L, d]."""
    laid_out = []
    for x, at, length in (
        (query, block.query_at, block.queries),
        (key, block.key_at, block.keys),
        (value, block.key_at, block.keys),
    ):
        slots = x.detach().reshape(x.shape[0], -1).index_select(0, at)
        laid_out.append(slots.view(block.pieces, length, *x.shape[1:]).transpose(1, 2))
    return laid_out


def _attention(laid_out: list[Tensor], block: Block, scale: float) -> Tensor:
    query, key, value = laid_out
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # there no fused kernel takes both a mask and fewer key heads
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        grouped = False
    return scaled_dot_product_attention(query, key, value, block.mask(), scale=scale, enable_gqa=grouped)


def _pieces(segments: np.ndarray) -> np.ndarray:
    """[K, 4] segments to [M, 6] pieces: (query start, queries, prefix start, prefix length, own start, own length)."""
    pieces = []
    for start, length, prefix, prefix_length in segments.tolist():
        for first in range(0, length, QUERY_BLOCK):
            queries = min(QUERY_BLOCK, length - first)
            pieces.append((start + first, queries, prefix, prefix_length, start, first + queries))
    return np.array(pieces, dtype=np.int64).reshape(-1, 6)


def _cut(pieces: np.ndarray) -> list[np.ndarray]:
    """Indices of the pieces of each block: neighbours in order of length, as long as padding stays cheap."""
    queries, keys = pieces[:, 1], pieces[:, 3] + pieces[:, 5]
    order = np.lexsort((queries, keys))
    blocks: list[np.ndarray] = []
    first, most_queries, needed = 0, 0, 0
    for last, piece in enumerate(order.tolist()):
        count, most_queries = last - first + 1, max(most_queries, int(queries[piece]))
        key_slots = count * int(keys[piece])  # keys ascend: this piece has the most so far
        needed += int(queries[piece] * keys[piece])
        area = key_slots * most_queries
        if count > 1 and (area > min(MAX_AREA, WASTE * needed + FREE_AREA) or key_slots > MAX_KEYS):
            blocks.append(order[first:last])
            first, most_queries, needed = last, int(queries[piece]), int(queries[piece] * keys[piece])
    return [*blocks, order[first:]] if len(order) else []


def _block(pieces: np.ndarray, device: torch.device | str) -> Block:
    start, queries, prefix, prefix_length, own, own_length = (column[:, None] for column in pieces.T)
    keys = prefix_length + own_length
    i, j = np.arange(queries.max())[None], np.arange(keys.max())[None]
    query_at = np.where(i < queries, start + i, start).ravel()
    key_at = np.where(j < prefix_length, prefix + j, np.where(j < keys, own + j - prefix_length, start)).ravel()
    real = np.flatnonzero(i < queries)
    padding = np.flatnonzero(i >= queries)
    tensors = (query_at, key_at, real, query_at[real], padding, (keys - queries)[:, 0])
    query_at_, key_at_, real_, rows_, padding_, offset_ = (torch.from_numpy(x).to(device) for x in tensors)
    return Block(
        pieces=len(pieces), queries=i.shape[1], keys=j.shape[1], query_at=query_at_, key_at=key_at_, real=real_,
        rows=rows_, padding=padding_, offset=offset_,
    )  # fmt: skip
