"""The in-page contrastive loss: a pure function of vectors, of which each page has some in two views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """By block [K]: `loss` (with gradient), `matched` (the share of the two directions in which the other view's block of
    the same place in the list is the most similar). `cosine` is the sum over all pairs of different blocks of a page, and
    `pairs` how many those are."""

    loss: Tensor
    matched: Tensor
    cosine: Tensor
    pairs: Tensor


def contrast(first: Tensor, second: Tensor, page: Tensor, *, temperature: float) -> Contrast:
    """InfoNCE in both directions. `first`, `second` [K, E] are unit vectors of the same K blocks in two views; `page` [K],
    ascending, says which blocks are of one page: only those are told from each other.

    A block's loss is the mean over both directions of -log softmax(cosine / temperature) at its own place: ln N where all N
    vectors of a page are equal, and 0 for a block that is alone.
    """
    pages, place, sizes = _places(page)
    shape = (len(sizes), int(sizes.max()), first.shape[-1])
    one, other = (first.new_zeros(shape).index_put((pages, place), vectors) for vectors in (first, second))
    cosine = one @ other.transpose(1, 2)
    there = torch.arange(shape[1], device=page.device) < sizes[:, None]
    both = there[:, :, None] & there[:, None]
    logits = cosine / temperature
    diagonal = logits.diagonal(dim1=1, dim2=2)
    different = both & ~torch.eye(shape[1], dtype=torch.bool, device=page.device)
    losses, matched = [], []
    for dim in (2, 1):
        # Rows of nothing but padding keep their zeros: a finite sum, which is not read.
        used = both | ~there[:, :, None] if dim == 2 else both | ~there[:, None]
        losses.append((logits.masked_fill(~used, float("-inf")).logsumexp(dim=dim) - diagonal)[pages, place])
        others = logits.detach().masked_fill(~different, float("-inf")).amax(dim=dim)
        matched.append((diagonal > others)[pages, place].float())  # a tie is no match: vectors may have collapsed
    return Contrast(
        loss=(losses[0] + losses[1]) / 2,
        matched=(matched[0] + matched[1]) / 2,
        cosine=torch.where(different, cosine.detach(), 0.0).sum(),
        pairs=different.sum(),
    )


def _places(page: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(which page, 0 to P - 1, and which place in it, of each block [K]; blocks of each page [P])."""
    _, which, sizes = torch.unique_consecutive(page, return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    return which, torch.arange(len(page), device=page.device) - starts[which], sizes
