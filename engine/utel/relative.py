"""Attention with UTel's relative terms, in two forms of one function.

The logit of query i and key j is (q_i.k_j + q_i.W_box s(box_j - box_i) + q_i.W_seq s(clip(p_j - p_i))) / sqrt(d): the query
meets what a sinusoid tells of the difference of the two boxes, and of the two places in the sequence (released code of
arXiv 2207.13979). One pair of projections serves all layers and heads.

`PlainTerms` is that sentence. It holds a vector for every pair of tokens, so its memory grows with L^2 D.

`FastTerms` never does. A sine of a difference is sines and cosines of the two, so the box term is a dot product of D
numbers that hang on i and q_i, and D numbers that hang on j alone, whatever the head and the layer: D more dimensions of
query and key, without a gradient on the key's side. The clipped term has only 2m + 1 distinct vectors: their products with
the query are made once and picked by distance. Without a clip it folds like the boxes. Queries go in chunks, and the
backward pass makes each chunk's logits again, so memory grows with L.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from engine.utel.config import COORDINATES, UtelConfig

MASKED = -10000.0
"""Added to the logits of padding."""
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Logits of a chunk of queries: what stays in a CPU's cache, or 256 MiB in fp32 on a GPU."""


class Terms(Protocol):
    """What all layers of one forward pass share."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """[B, A, L, d] x3 -> [B, A, L, d]."""
        ...


def frequencies(size: int, device: torch.device) -> Tensor:
    """w_k = 10000^(-2k / size) for k below size / 2, fp64."""
    return 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)


def angles(config: UtelConfig, coordinates: Tensor) -> Tensor:
    """Integers [..., C] -> [..., C, D / C / 2], fp64: they reach 1000 rad, where fp32 is off by 3e-5 and fp16 holds nothing."""
    size = config.sinusoid_size // coordinates.shape[-1]
    return coordinates[..., None].double() * frequencies(size, coordinates.device)


def sinusoid(config: UtelConfig, coordinates: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., C] -> [..., D]: of each coordinate its sines, then its cosines. The angles are fp32 at least."""
    size = config.sinusoid_size // coordinates.shape[-1]
    exact = torch.promote_types(dtype, torch.float32)
    turns = coordinates[..., None].to(exact) * frequencies(size, coordinates.device).to(exact)
    return torch.cat([turns.sin(), turns.cos()], dim=-1).flatten(-2).to(dtype)


class PlainTerms:
    """The definition: `box_terms` and `sequence_terms` [B, L, L, d] are b_ij and r_ij."""

    def __init__(
        self,
        config: UtelConfig,
        *,
        boxes: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        box: Tensor,
        sequence: Tensor,
    ) -> None:
        """`boxes` [B, L, 4] and `positions` [B, L] integers, `mask` [B, L] bool, weights `box` and `sequence` [d, D]."""
        self.bias = _padding(mask, box.dtype)
        self.box_terms = sinusoid(config, boxes[:, None] - boxes[:, :, None], box.dtype) @ box.T
        self.sequence_terms: Tensor | None = None
        if config.sequence_term == "relative":
            distance = positions[:, None] - positions[:, :, None]
            if (m := config.clip_distance) is not None:
                distance = distance.clamp(-m, m)
            self.sequence_terms = sinusoid(config, distance[..., None], sequence.dtype) @ sequence.T

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        logits = query @ key.transpose(-1, -2) + torch.einsum("baid,bijd->baij", query, self.box_terms)
        if self.sequence_terms is not None:
            logits = logits + torch.einsum("baid,bijd->baij", query, self.sequence_terms)
        logits = logits / math.sqrt(query.shape[-1])
        if self.bias is not None:
            logits = logits + self.bias
        return functional.dropout(logits.softmax(dim=-1), dropout) @ value


class FastTerms:
    """`keys` [B, L, K] are the folded dimensions of the keys; `sines` and `cosines` [B, 1, L, K / 2] what folds a query."""

    def __init__(
        self,
        config: UtelConfig,
        *,
        boxes: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        box: Tensor,
        sequence: Tensor,
    ) -> None:
        """Takes what `PlainTerms` takes."""
        self.bias, self.positions = _padding(mask, box.dtype), positions
        turns, weights = [angles(config, boxes).flatten(-2)], [_halves(box, COORDINATES)]
        self.distances: Tensor | None = None
        if config.sequence_term == "relative" and config.clip_distance is None:
            near = positions - positions.amin(dim=-1, keepdim=True)  # only differences count
            turns.append(angles(config, near[..., None]).flatten(-2))
            weights.append(_halves(sequence, 1))
        elif config.sequence_term == "relative":
            self.m = config.clip_distance or 0
            steps = torch.arange(-self.m, self.m + 1, device=positions.device)
            self.distances = sequence @ sinusoid(config, steps[:, None], sequence.dtype).T
        turn = torch.cat(turns, dim=-1)
        self.sines, self.cosines = turn.sin().to(box.dtype)[:, None], turn.cos().to(box.dtype)[:, None]
        self.keys = torch.cat([self.sines, self.cosines], dim=-1)[:, 0]
        self.of_sine, self.of_cosine = (torch.cat(parts, dim=-1) for parts in zip(*weights, strict=True))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        batch, heads, length, _ = query.shape
        budget = CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS["cuda"])
        rows = max(1, min(length, budget // (batch * heads * length)))
        pieces = []
        for first in range(0, length, rows):
            part = query[:, :, first : first + rows]
            if torch.is_grad_enabled():
                pieces.append(checkpoint(self._chunk, part, key, value, first, dropout, use_reentrant=False))
            else:
                pieces.append(self._chunk(part, key, value, first, dropout))
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def _chunk(self, query: Tensor, key: Tensor, value: Tensor, first: int, dropout: float) -> Tensor:
        """The queries [B, A, C, d] of the places from `first` on."""
        batch, heads, rows, size = query.shape
        folded = self._fold(query, slice(first, first + rows)).reshape(batch, heads * rows, -1)
        if self.distances is None:
            terms = torch.bmm(folded, self.keys.transpose(1, 2))
        else:
            near = (query @ self.distances).gather(-1, self._steps(first, rows, heads))
            terms = torch.baddbmm(near.view(batch, heads * rows, -1), folded, self.keys.transpose(1, 2))
        # Added where the sum is made: no pass over all pairs but the products themselves.
        logits = torch.baddbmm(
            terms.view(batch * heads, rows, -1),
            query.reshape(batch * heads, rows, size),
            key.flatten(0, 1).transpose(1, 2),
            beta=1 / math.sqrt(size),
            alpha=1 / math.sqrt(size),
        )
        if self.bias is not None:
            logits = (logits.view(batch, heads, rows, -1) + self.bias).flatten(0, 1)
        weights = functional.dropout(logits.softmax(dim=-1), dropout)
        return torch.bmm(weights, value.flatten(0, 1)).view(batch, heads, rows, size)

    def _fold(self, query: Tensor, rows: slice) -> Tensor:
        """The query's side of the angle sum: sin(b - a) = sin b cos a - cos b sin a, cos(b - a) = sin b sin a + cos b cos a."""
        sine, cosine = query @ self.of_sine, query @ self.of_cosine
        sin, cos = self.sines[:, :, rows], self.cosines[:, :, rows]
        return torch.cat([sine * cos + cosine * sin, cosine * cos - sine * sin], dim=-1)

    def _steps(self, first: int, rows: int, heads: int) -> Tensor:
        """[B, A, C, L]: which of the 2m + 1 vectors a pair has."""
        distance = self.positions[:, None] - self.positions[:, first : first + rows, None]
        return (distance.clamp(-self.m, self.m) + self.m)[:, None].expand(-1, heads, -1, -1)


def _halves(weight: Tensor, coordinates: int) -> tuple[Tensor, Tensor]:
    """The columns [d, D] that meet sines and those that meet cosines, each [d, D / 2]."""
    split = weight.view(weight.shape[0], coordinates, 2, -1)
    return split[:, :, 0].flatten(1), split[:, :, 1].flatten(1)


def _padding(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, 1, 1, L] to add to the logits; None without padding."""
    return None if mask is None else torch.where(mask, 0.0, MASKED).to(dtype)[:, None, None]
