"""The encoder's shape and switches. The field names are those of Hugging Face's LayoutLM config, so a `config.json` is this
struct and a few more keys."""

from __future__ import annotations

from typing import Literal, Self

from msgspec import Struct

COORDINATES = 4
SIZE = 1000
"""Boxes are in thousandths of the page's width and height."""


class UtelConfig(Struct, frozen=True, kw_only=True):
    """Defaults are the base model (sizes by its parameter count, the rest from LayoutLM's config).

    `sequence_term` is what tells the order of the sub-tokens: "relative" (clipped at +-`clip_distance`, or not at all when
    that is None), "absolute" (a table of `max_position_embeddings` entries, which are then the longest input) or "none".
    `attention` "fast" and "plain" are the same function, see `engine.utel.relative`.

    Raises `ValueError` naming the field, what it got and what it expected.
    """

    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    max_2d_position_embeddings: int = 1024
    max_position_embeddings: int = 512
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    clip_distance: int | None = 50
    sequence_term: Literal["relative", "absolute", "none"] = "relative"
    attention: Literal["fast", "plain"] = "fast"

    @classmethod
    def base(cls) -> Self:
        """110,686,464 parameters without a task head."""
        return cls()

    @classmethod
    def large(cls) -> Self:
        """336,747,520 parameters without a task head."""
        return cls(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

    @classmethod
    def small(cls) -> Self:
        """For CPUs: 11,571,968 parameters, of which the words take 7,813,632; fewer with a vocabulary of one's own."""
        return cls(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def sinusoid_size(self) -> int:
        """D: how many sines and cosines describe a difference of boxes, or of places in the sequence."""
        return self.hidden_size // 4

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "type_vocab_size", "max_position_embeddings"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.hidden_size % (4 * 2 * COORDINATES):  # a quarter of it is sines and cosines of four coordinates
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected a multiple of {4 * 2 * COORDINATES}")
        if self.max_2d_position_embeddings <= SIZE:
            raise ValueError(
                f"max_2d_position_embeddings: got {self.max_2d_position_embeddings}, expected more than {SIZE}, the largest coordinate"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id: got {self.pad_token_id}, expected 0 to {self.vocab_size - 1}")
        if self.clip_distance is not None and self.clip_distance < 0:
            raise ValueError(f"clip_distance: got {self.clip_distance}, expected 0 or more, or None for no clipping")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more and less than 1")
