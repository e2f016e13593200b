"""WordPiece tokenizers: those of BERT-shaped folders, and one of one's own for work without any.

The files are those that `transformers.AutoTokenizer` loads.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.config_section import ConfigError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL = (PAD, UNK, CLS, SEP, MASK)
PREFIX = "##"


class WordPiece:
    """A tokenizer whose five special tokens are BERT's. `ordinary` are the ids of all other tokens, ascending.

    Raises `ConfigError` for one that lacks a special token.
    """

    def __init__(self, tokenizer: Tokenizer, where: str = "tokenizer") -> None:
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if missing := [token for token in SPECIAL if token not in vocabulary]:
            raise ConfigError(
                f"{where}: has no {', '.join(missing)}, expected BERT's special tokens {', '.join(SPECIAL)}"
            )
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.no_truncation()  # published files carry limits of their own
        self.tokenizer.no_padding()
        special = [vocabulary[token] for token in SPECIAL]
        self.pad, self.unk, self.cls, self.sep, self.mask = special
        self.size = max(vocabulary.values()) + 1
        self.ordinary = np.setdiff1d(np.array(list(vocabulary.values())), special)

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(sub-tokens int64 [T], starts int64 [W + 1]): word w has the sub-tokens starts[w]..starts[w + 1] - 1, at least
        one: a word of which nothing is left (invisible characters), or that spells a special token, is unknown."""
        encoding = self.tokenizer.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        ids: list[list[int]] = [[] for _ in words]
        special = {self.pad, self.cls, self.sep, self.mask}
        for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
            if word is not None:
                ids[word].append(self.unk if token in special else token)
        lists = [pieces or [self.unk] for pieces in ids]
        starts = np.concatenate([[0], np.cumsum([len(pieces) for pieces in lists], dtype=np.int64)])
        return np.array([token for pieces in lists for token in pieces], dtype=np.int64), starts.astype(np.int64)


def load_wordpiece(folder: str | Path) -> WordPiece:
    """The tokenizer of a folder with a tokenizer.json. Raises `ConfigError` without one."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{folder}: no tokenizer.json there")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    return WordPiece(tokenizer, str(file))


def save_wordpiece(pieces: WordPiece, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    pieces.tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "unk_token": UNK,
        "cls_token": CLS,
        "sep_token": SEP,
        "mask_token": MASK,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def train_wordpiece(texts: Iterable[str], size: int, *, lowercase: bool = True) -> WordPiece:
    """A WordPiece tokenizer of at most `size` tokens for these texts, split and lowered as BERT does.

    A function of the texts and the size, which `tokenizers`' own WordPiece trainer is not (equal calls number and choose
    tokens differently): byte-pair merges are learnt regardless of where in a word they stand, the words are cut by them,
    and the pieces that occur most, each as a beginning and as a continuation, are the vocabulary, with all characters.

    Raises `ConfigError` when the characters alone do not fit.
    """
    words = _count_words(texts, lowercase)
    merges = Tokenizer(models.BPE())
    merges.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    merges.train_from_iterator(
        (" ".join([word] * count) for word, count in sorted(words.items())),
        trainers.BpeTrainer(vocab_size=size, show_progress=False),
    )
    pieces: Counter[str] = Counter()
    characters: set[str] = set()
    for word, count in words.items():
        characters |= {word[0], *(PREFIX + character for character in word[1:])}
        for place, piece in enumerate(merges.encode(word).tokens):
            pieces[PREFIX + piece if place else piece] += count
    room = size - len(SPECIAL) - len(characters)
    if room < 0:
        raise ConfigError(
            f"size: got {size}, expected at least {size - room}: the texts' characters and special tokens"
        )
    frequent = sorted(pieces.keys() - characters, key=lambda piece: (-pieces[piece], piece))[:room]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(characters), *frequent])}
    return WordPiece(_bert_tokenizer(vocabulary, lowercase))


def _count_words(texts: Iterable[str], lowercase: bool) -> Counter[str]:
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    return words


def _bert_tokenizer(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, continuing_subword_prefix=PREFIX))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=PREFIX)
    tokenizer.post_processor = processors.BertProcessing((SEP, vocabulary[SEP]), (CLS, vocabulary[CLS]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
