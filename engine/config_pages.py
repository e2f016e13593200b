"""Runs of UTel: the model, the pages that it reads, and what it learns from them. No torch here."""

from __future__ import annotations

from typing import Literal

from msgspec import field

from engine.config_section import Section
from engine.config_tasks import RECEIPT_FIELDS
from engine.utel.config import UtelConfig
from engine.utel.pretraining.config import PretrainingConfig


class UtelModel(Section, frozen=True, tag="utel"):
    """A UTel of one of the sizes, of which single numbers may be changed, with fresh heads.

    Its encoder and its word pieces are those of a cold start, or of `path`: a UTel's folder or a BERT checkpoint of the same
    sizes. Without either they are fresh, and the `vocabulary` pieces are learnt from the run's training pages.
    `sequence` says what tells the order of sub-tokens; `clip_distance` -1 does not clip it.
    """

    size: Literal["small", "base", "large"] = "small"
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    intermediate: int | None = None
    vocabulary: int = 4000
    path: str | None = None
    dropout: float = 0.1
    sequence: Literal["relative", "absolute", "none"] = "relative"
    clip_distance: int = 50
    max_positions: int = 512

    def shape(self, vocabulary: int) -> UtelConfig:
        """The encoder's. Raises `ValueError` for sizes that do not fit together."""
        size = {"small": UtelConfig.small, "base": UtelConfig.base, "large": UtelConfig.large}[self.size]()
        return UtelConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden or size.hidden_size,
            num_hidden_layers=self.layers or size.num_hidden_layers,
            num_attention_heads=self.heads or size.num_attention_heads,
            intermediate_size=self.intermediate or size.intermediate_size,
            max_position_embeddings=self.max_positions,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            clip_distance=None if self.clip_distance < 0 else self.clip_distance,
            sequence_term=self.sequence,
        )


class PagesTask(Section, frozen=True, tag="pages"):
    """Pages to read. `path` is what a task of type "documents" may have; without it `synthetic` pages are drawn, a function
    of `seed`. About `held_out` pages are held out: whole companies, templates or PDF files. `boxes` "hidden" puts all of
    them out of sight, "shuffled" gives each word another word's: controls that show what layout is worth. `joined` pages
    at a time stand on one sheet (held-out ones by themselves; fields are then not compared): text for long rows."""

    path: str | None = None
    synthetic: int = 20_000
    seed: int = 0
    boxes: Literal["seen", "hidden", "shuffled"] = "seen"
    joined: int = 1
    held_out: int = 100
    weight: float = 1.0


class UtelObjective(PretrainingConfig, frozen=True, tag="utel"):
    """UTel's joint pretraining: masked words, surrounding words, contrastive word embeddings. Evaluations read the held-out
    pages in rows of `length`, and once more for each of `test_lengths`."""

    test_lengths: list[int] = field(default_factory=list)


class UtelTagObjective(Section, frozen=True, tag="utel-tag"):
    """Entity tagging: cross-entropy over the words' tags, of these `fields`, in rows of at most `length` sub-tokens.
    Evaluations read in rows of that length, and once more for each of `test_lengths`.

    With `vary` a page is not seen twice as it is: its digits are exchanged for one another (equal amounts stay equal), and
    the page is moved and scaled by up to the share `vary` of its size. The share `hide` of its words is covered with [MASK]
    each time: what a word is must also follow from its place and from the words around it.
    """

    fields: list[str] = field(default_factory=lambda: list(RECEIPT_FIELDS))
    scheme: Literal["BIO", "BIES"] = "BIES"
    length: int = 512
    test_lengths: list[int] = field(default_factory=list)
    vary: float = 0.1
    hide: float = 0.0
