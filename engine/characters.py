"""A tokenizer of one token a character, in the files that `transformers` and `tokenizers` read.

It has no token for unknown characters: text outside the alphabet is an error in every reader, never a silent `<unk>`.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from engine.config import ConfigError

PAD, EOS = 0, 1
SPECIAL = ["<pad>", "<eos>"]


def save_tokenizer(alphabet: str, folder: Path, *, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json: ids 0 and 1 are `<pad>` and `<eos>`, then the alphabet's characters.

    Raises `ConfigError` for an empty alphabet or a repeated character.
    """
    repeated = sorted({c for c in alphabet if alphabet.count(c) > 1})
    if not alphabet or repeated:
        got = f"{''.join(repeated)!r} more than once" if repeated else "no character"
        raise ConfigError(f"model.alphabet: got {got}, expected at least one character, each once")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # not in the vocabulary: unknown is an error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "eos_token": SPECIAL[EOS],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
