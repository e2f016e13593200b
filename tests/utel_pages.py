"""Pages made up for tests of the encoder: words of few letters in a grid."""

from __future__ import annotations

import string

import msgspec
import numpy as np

from engine.utel.encode import EncodedPage, encode_page
from engine.utel.model import UtelConfig
from engine.utel.wordpiece import WordPiece, train_wordpiece

LETTERS = string.ascii_lowercase[:12]
TINY = UtelConfig(
    vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, clip_distance=20
)
"""With dropout, as a model to be trained has it."""
STILL = msgspec.structs.replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def make_words(count: int, seed: int) -> list[str]:
    """Of one to four letters, so that some come more than once on a page."""
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list(LETTERS), random.integers(1, 5))) for _ in range(count)]


def make_boxes(count: int, columns: int = 6) -> list[tuple[int, int, int, int]]:
    """Lines of `columns` words each, evenly over the page."""
    lines = -(-count // columns)
    width, height = 900 // columns, 900 // max(lines, 1)
    places = [(50 + width * (n % columns), 50 + height * (n // columns)) for n in range(count)]
    return [(x, y, x + width - 20, y + max(height - 8, 4)) for x, y in places]


def make_pieces() -> WordPiece:
    return train_wordpiece([" ".join(make_words(400, seed=9))], 100)


def make_page(pieces: WordPiece, count: int, seed: int) -> EncodedPage:
    return encode_page(pieces, make_words(count, seed), make_boxes(count), id=f"page-{seed}")
