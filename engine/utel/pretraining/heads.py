"""The encoder with what pretraining asks of it. Heads over the vocabulary share the word embeddings' weights and have a bias
of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from engine.utel.model import Utel, UtelConfig, initialise
from engine.utel.pretraining.config import DIRECTIONS, CweConfig, PretrainingConfig

CHUNK_ELEMENTS = 1 << 23
"""Logits over the vocabulary that exist at a time: 32 MiB in fp32."""


class UtelPretraining(nn.Module):
    """`utel` and a head for each task of the config. Fresh heads; the encoder is as it is given."""

    def __init__(self, utel: Utel, config: PretrainingConfig) -> None:
        super().__init__()
        self.utel = utel
        sizes = utel.config
        if config.mllm.weight:
            self.mllm = VocabularyHead(sizes, sizes.hidden_size)
        if config.swp.weight:
            self.swp = NeighbourHead(sizes) if config.swp.reading == "vocabulary" else PairHead(sizes)
        if config.cwe.weight:
            self.cwe = ContrastHead(sizes, config.cwe)
        for head in self.children():
            if head is not utel:
                initialise(head, sizes.initializer_range)

    @property
    def words(self) -> Tensor:
        """The embeddings [V, H] that the heads share."""
        return self.utel.embeddings.word_embeddings.weight


class VocabularyHead(nn.Module):
    """LayerNorm(GELU(dense(x))) against every word's embedding."""

    def __init__(self, config: UtelConfig, inputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, words: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`states` [T, inputs], `labels` [T] -> (-log p(label) [T] in fp32, the likeliest id [T])."""
        return vocabulary_nll(self.LayerNorm(functional.gelu(self.dense(states))), words, self.bias, labels)


class NeighbourHead(nn.Module):
    """A word's state and a direction to the word that is there."""

    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.direction = nn.Embedding(len(DIRECTIONS), config.hidden_size)
        self.word = VocabularyHead(config, 2 * config.hidden_size)

    def forward(self, states: Tensor, asked: Tensor, words: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`states` [T, H] of the anchors, `asked` [T] directions."""
        return self.word(torch.cat([states, self.direction(asked)], dim=-1), words, labels)


class PairHead(nn.Module):
    """Two words' states to where the second is: 0 elsewhere, 1 + direction."""

    def __init__(self, config: UtelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.classes = nn.Linear(config.hidden_size, len(DIRECTIONS) + 1)

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classes(functional.gelu(self.dense(torch.cat([first, second], dim=-1)))).float()
        return functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1)


class ContrastHead(nn.Module):
    """Words' states to vectors of length 1, fp32."""

    def __init__(self, config: UtelConfig, cwe: CweConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, cwe.size)

    def forward(self, states: Tensor) -> Tensor:
        return functional.normalize(self.out(functional.gelu(self.dense(states))).float(), dim=-1)


def vocabulary_nll(states: Tensor, words: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(-log softmax(states @ words.T + bias) at `labels` in fp32, the likeliest id), [T] each. Some of the logits exist at a
    time; the backward pass makes them again."""
    rows = max(1, CHUNK_ELEMENTS // len(bias))
    pieces = []
    for some, answers in zip(states.split(rows), labels.split(rows), strict=True):
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_nll, some, words, bias, answers, use_reentrant=False))
        else:
            pieces.append(_nll(some, words, bias, answers))
    nll, likeliest = zip(*pieces, strict=True)
    return torch.cat(nll), torch.cat(likeliest)


def _nll(states: Tensor, words: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = functional.linear(states, words, bias).float()
    return functional.cross_entropy(logits, labels, reduction="none"), logits.argmax(dim=-1)
