"""Drawing tokens: one uniform number per (seed, sample, position), turned into a token by the inverse distribution function.

Nothing here has a state, so a response does not depend on which sequences share its batch or on which generator
continues it. Device work is batched over the sequences and ends in the caller's one copy of N tokens to the host.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 256
"""Vocabulary entries summed before the running sum is taken: a running sum over a whole vocabulary is slow and, in
float32, inexact."""
_FIRST_TRUNCATION = 128
"""Candidates that the nucleus is looked for in first; a full sort of a large vocabulary costs more than a layer."""


def sequence_key(seed: int, sample: int) -> int:
    """64 bits that stand for sample `sample` of a ticket with this seed."""
    start = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return int(_mix(_mix(start) + np.array([sample + 1], dtype=np.uint64) * _GOLDEN)[0])


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 1): the draw of each sequence (`keys` uint64 [N]) for its response token at `positions` [N].

    A counter-based generator: output `position` of SplitMix64 (Steele, Lea and Flood, 2014) started at the key.
    """
    bits = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(
    logits: Tensor, uniform: np.ndarray, *, temperature: np.ndarray, top_p: np.ndarray, top_k: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [N] and their log-probabilities float32 [N].

    `logits` [N, V]; the rest [N], one entry per sequence: `uniform` float64 in [0, 1), `top_p` 1 and `top_k` 0 switch
    truncation off. The log-probability is that of the temperature-scaled softmax over the whole vocabulary, whatever
    the truncation: it is the distribution that is trained.
    """
    scaled = logits.float()
    if np.any(temperature != 1.0):
        scaled = scaled / _on(scaled, temperature.astype(np.float32))[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    probabilities = logprobs.exp()
    cut = np.flatnonzero((top_p < 1.0) | (top_k > 0))
    if cut.size:
        rows = _on(scaled, cut)
        probabilities[rows] = truncate(probabilities[rows], top_p=top_p[cut], top_k=top_k[cut])
    tokens = invert(probabilities, _on(scaled, uniform))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def truncate(probabilities: Tensor, *, top_p: np.ndarray, top_k: np.ndarray) -> Tensor:
    """`probabilities` [N, V] with what top-k and top-p exclude set to zero; not normalised anew.

    First the `top_k` likeliest remain, then of these the fewest that hold `top_p` of their mass (Holtzman et al.,
    2020). Tokens as likely as the last one that remains do too, so the result does not depend on how a sort breaks ties.
    """
    vocabulary = probabilities.shape[-1]
    mass = _on(probabilities, top_p.astype(np.float32))[:, None]
    ranks = _on(probabilities, np.where(top_k > 0, np.minimum(top_k, vocabulary), vocabulary))[:, None]
    width = min(_FIRST_TRUNCATION, vocabulary)
    while True:
        likeliest = probabilities.topk(width, dim=-1).values
        held = likeliest.cumsum(-1)
        if width == vocabulary or bool(((ranks <= width) | ((ranks == vocabulary) & (held[:, -1:] >= mass))).all()):
            break
        width = min(8 * width, vocabulary)
    rank = torch.arange(width, device=probabilities.device)
    of_k = held.gather(-1, (ranks - 1).clamp(max=width - 1))
    # Without top-k the mass is that of the whole distribution, not of the candidates looked at.
    target = mass * torch.where(ranks < vocabulary, of_k, 1.0)
    remain = ((rank < ranks) & (held - likeliest < target)).sum(-1, keepdim=True)
    threshold = likeliest.gather(-1, (remain - 1).clamp(min=0))
    return probabilities.where(probabilities >= threshold, 0.0)


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token int64 [N] at which each row's running sum, over the row's sum, passes `uniform` float64 [N].

    `probabilities` [N, V] need not be normalised. Never returns a token of probability zero.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary <= 2 * _BLOCK:
        return _locate(probabilities, uniform)[0]
    padding = -vocabulary % _BLOCK
    if padding:
        probabilities = torch.nn.functional.pad(probabilities, (0, padding))
    blocks = probabilities.view(rows, -1, _BLOCK)
    block, within = _locate(blocks.sum(-1), uniform)
    chosen = blocks[torch.arange(rows, device=block.device), block]
    return (block * _BLOCK + _locate(chosen, within)[0]).clamp_(max=vocabulary - 1)


def _locate(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index that `uniform` falls on, and how far into that index's share it falls, again in [0, 1)."""
    running = weights.cumsum(-1, dtype=torch.float64)
    total = running[:, -1]
    # At most 1 - 2**-53 times the total, which rounds to less than it: a larger entry exists, of positive weight.
    # Clamped for rows of NaN only: their log-probability tells the caller, an index out of range would not.
    target = uniform * total
    index = torch.searchsorted(running, target[:, None], right=True).clamp_(max=weights.shape[-1] - 1)
    share = weights.gather(-1, index)[:, 0].double()
    before = running.gather(-1, index)[:, 0] - share
    fraction = ((target - before) / share).clamp(0.0, 1.0 - 2.0**-53)
    return index[:, 0], fraction


def _on(like: Tensor, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device, non_blocking=True)
