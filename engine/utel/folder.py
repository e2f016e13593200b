"""UTel on disk, as a Hugging Face folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

A model with heads (for pretraining, for tagging) keeps the encoder's weights under `utel.`; any of them can be read as an
encoder.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.config_section import ConfigError
from engine.utel.model import Utel, UtelConfig
from engine.utel.wordpiece import WordPiece, save_wordpiece

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREFIX = "utel."

_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_FRESH = {"x_position_embeddings", "y_position_embeddings", "bbox_projection", "seq_projection", "pooler"}
_TABLE = "embeddings.position_embeddings.weight"


def save_folder(
    folder: str | Path,
    model: nn.Module,
    config: UtelConfig,
    pieces: WordPiece,
    *,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `model` (a `Utel`, or a model that holds one as `utel`) and its tokenizer; `extra` are more keys of config.json.

    The folder appears whole or not at all. Raises `ConfigError` when it exists, or when the tokenizer has more tokens than
    the model.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder}: exists already")
    if pieces.size > config.vocab_size:
        raise ConfigError(
            f"{folder}: a tokenizer of {pieces.size} tokens, expected at most {config.vocab_size} (vocab_size)"
        )
    weights = {name: weight.detach().cpu().contiguous() for name, weight in sorted(model.named_parameters())}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    kind = {"model_type": "utel", "architectures": [type(model).__name__], "dtype": dtype}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        document = {**kind, **msgspec.to_builtins(config), **(extra or {})}
        (temporary / CONFIG).write_text(json.dumps(document, indent=2), encoding="utf-8")
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        save_wordpiece(pieces, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_utel(folder: str | Path) -> Utel:
    """The encoder of a folder, of a model with heads too, in eval mode. Raises `ConfigError` for what is missing, unreadable
    or of other sizes."""
    folder = Path(folder)
    document = read_config(folder)
    model = Utel(utel_config(document, folder))
    weights = read_weights(folder)
    if any(name.startswith(PREFIX) for name in weights):
        weights = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}
    fill(model, weights, folder)
    return model.eval()


def from_bert(folder: str | Path, config: UtelConfig | None = None, *, seed: int = 0) -> Utel:
    """An encoder that starts from a BERT of the same sizes: its words, layers and pooler. The edges' tables and the relative
    projections are fresh, a function of `seed` (and a pooler, where BERT has none). BERT's table of places is dropped; with
    `sequence_term` "absolute" it stays.

    `config` None takes BERT's sizes and UTel's defaults. Raises `ConfigError` for another kind of model, for sizes that
    differ from `config`, and for weights that are missing.
    """
    folder = Path(folder)
    document = read_config(folder)
    if document.get("model_type") != "bert" or document.get("position_embedding_type", "absolute") != "absolute":
        got = {key: document.get(key) for key in ("model_type", "position_embedding_type")}
        raise ConfigError(f"{folder / CONFIG}: got {got}, expected a bert with absolute positions")
    config = _like_bert(document, config or UtelConfig(), folder, fixed=config is not None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Utel(config)
    own = model.state_dict()
    weights = {_own_name(name): weight for name, weight in read_weights(folder).items()}
    fresh = {name for name in own if name not in weights and name.split(".")[0 if "pooler" in name else 1] in _FRESH}
    if config.sequence_term != "absolute":
        weights.pop(_TABLE, None)
    known = {name: weight for name, weight in weights.items() if name in own}  # the rest are BERT's own heads
    fill(model, {**known, **{name: own[name] for name in fresh}}, folder)
    return model.eval()


def _own_name(name: str) -> str:
    """A BERT's tensor by the name it has here. The oldest checkpoints call LayerNorm's weights gamma and beta."""
    name = name.removeprefix("bert.")
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _like_bert(document: Mapping[str, Any], config: UtelConfig, folder: Path, *, fixed: bool) -> UtelConfig:
    if document.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"{folder / CONFIG}: hidden_act: got {document['hidden_act']!r}, expected 'gelu'")
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "type_vocab_size", "layer_norm_eps", "pad_token_id"]  # fmt: skip
    if config.sequence_term == "absolute" or not fixed:
        sizes.append("max_position_embeddings")
    given = {name: document[name] for name in sizes if name in document}
    for name, value in given.items():
        if fixed and getattr(config, name) != value:
            raise ConfigError(f"{folder / CONFIG}: {name}: got {value}, expected {getattr(config, name)}, as asked for")
    return _convert({**msgspec.to_builtins(config), **given}, folder)


def utel_config(document: Mapping[str, Any], folder: Path) -> UtelConfig:
    """UTel's part of a config.json. Raises `ConfigError` for another kind of model and for sizes that cannot be."""
    if document.get("model_type") != "utel":
        raise ConfigError(f"{folder / CONFIG}: model_type: got {document.get('model_type')!r}, expected 'utel'")
    return _convert(document, folder)


def _convert(document: Mapping[str, Any], folder: Path) -> UtelConfig:
    known = {name: value for name, value in document.items() if name in UtelConfig.__struct_fields__}
    try:
        return msgspec.convert(known, UtelConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as plain data. Raises `ConfigError`."""
    try:
        document = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {CONFIG} there; expected a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG}: cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{folder / CONFIG}: got a {type(document).__name__}, expected an object")
    return document


def read_weights(folder: Path) -> dict[str, Tensor]:
    """model.safetensors, on the CPU. Raises `ConfigError`; PyTorch's pickled files are not read."""
    try:
        return load_file(folder / WEIGHTS)
    except FileNotFoundError:
        pickled = " (there is a pytorch_model.bin, which is not read: save it as safetensors)"
        hint = pickled if (folder / "pytorch_model.bin").exists() else ""
        raise ConfigError(f"{folder}: no {WEIGHTS} there{hint}") from None
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / WEIGHTS}: cannot be read: {error}") from error


def fill(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Copy the weights into the model. Raises `ConfigError` for the first that is missing, unknown or of another shape."""
    own = dict(model.named_parameters())
    for name in sorted({*own, *weights}):
        got = list(weights[name].shape) if name in weights else "no such tensor"
        expected = list(own[name].shape) if name in own else "no such tensor"
        if got != expected:
            raise ConfigError(f"{folder / WEIGHTS}: {name}: got {got}, expected {expected}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
