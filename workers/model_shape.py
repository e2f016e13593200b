"""How large a policy is, from its numbers alone: no weights are read and no torch is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msgspec import Struct

from engine.characters import SPECIAL
from engine.config import Config, ConfigError, NewModel, PathModel, UtelModel, load_config

BYTES = {"float32": 4, "bfloat16": 2}
QKV_BIAS = {"qwen2"}
"""Families whose query, key and value layers have biases that config.json does not mention."""
QK_NORM = {"qwen3"}
"""Families that normalise queries and keys, with a weight of one head's size for each."""


class ModelShape(Struct, frozen=True):
    """A decoder of the Llama kind. `context` is the longest sequence it was made for, in tokens."""

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    intermediate: int
    context: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Exact for Llama, Qwen2, Qwen2.5, Qwen3 and Mistral; for another dense family an estimate."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        attention = self.hidden * (2 * queries + 2 * keys)
        attention += queries + 2 * keys if self.family in QKV_BIAS else 0
        attention += 2 * self.head if self.family in QK_NORM else 0
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden

    def kv_bytes(self, tokens: int, dtype: str) -> int:
        """Keys and values of `tokens` tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head * BYTES[dtype]


def model_shape(config: Config) -> ModelShape:
    """The policy of a run, also before it exists. Raises `ConfigError` when its folder or its config.json is not there."""
    model = starting_model(config)
    if isinstance(model, NewModel):
        return ModelShape(
            family="llama",
            vocabulary=len(model.alphabet) + len(SPECIAL),
            hidden=model.hidden,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head=model.hidden // model.heads,
            intermediate=model.intermediate,
            context=model.context,
            tied=True,
        )
    if isinstance(model, UtelModel):
        raise ConfigError("model: a UTel is no decoder")
    return read_shape(Path(model.path))


def starting_model(config: Config) -> PathModel | NewModel | UtelModel:
    """The model that step 0 starts from; a cold start's own where there is one. Raises `ConfigError`."""
    seen = set()
    while config.cold_start:
        path = Path(config.cold_start).resolve()
        if path in seen:
            raise ConfigError(f"{config.source}: cold_start: {config.cold_start} leads back to itself")
        seen.add(path)
        config = load_config(config.cold_start)
    return config.model


def read_shape(folder: Path) -> ModelShape:
    """Of a Hugging Face folder's config.json. Raises `ConfigError`."""
    file = folder / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"model.path: {folder}: no config.json there; expected a Hugging Face model folder"
        ) from error
    except ValueError as error:
        raise ConfigError(f"model.path: {file}: not JSON: {error}") from error
    try:
        return _shape(data)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(f"model.path: {file}: got no usable {error}, expected a decoder's config") from error


def _shape(data: dict[str, Any]) -> ModelShape:
    heads = int(data["num_attention_heads"])
    return ModelShape(
        family=str(data["model_type"]),
        vocabulary=int(data["vocab_size"]),
        hidden=int(data["hidden_size"]),
        layers=int(data["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(data.get("num_key_value_heads") or heads),
        head=int(data.get("head_dim") or data["hidden_size"] // heads),
        intermediate=int(data["intermediate_size"]),
        context=int(data["max_position_embeddings"]),
        tied=bool(data.get("tie_word_embeddings", False)),
    )
