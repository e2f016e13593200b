"""The critic: the policy's architecture with a value head in place of the output layer over the vocabulary.

Its folder is one of transformers' token classification models with one label, `value`, so it loads there unchanged. The
value of a response's token is read where the policy reads its distribution: at the position before the token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from engine.attention import NAME
from engine.config import ConfigError
from engine.devices import resolve_device
from engine.models import DTYPES, hidden_states, quiet, read_config, read_weights, refuse_missing
from engine.packing import Pack

HEAD = "score"
FOLDER = "critic"
"""The critic's place in a checkpoint and in a run."""
SAME = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size",
)  # fmt: skip
"""What a critic's config must have in common with its policy's."""


def load_critic(
    path: str | Path | None, policy: str | Path, *, dtype: str, device: str, weights: bool = True
) -> PreTrainedModel:
    """The critic in the folder `path`; None starts one from the folder of the policy, with a head of zeros. In eval mode,
    all parameters of `dtype`. With `weights=False` none are read, and nobody has written them yet: they come from another
    rank.

    Raises `ConfigError` for a missing or broken folder, one that is no critic, and one whose architecture, size,
    vocabulary or tokenizer is not that of the policy.
    """
    policy = Path(policy)
    folder = policy if path is None else Path(path)
    if path is not None and not (folder / "config.json").is_file():
        raise ConfigError(f"critic.path: {folder}: no config.json there; expected a critic's folder")
    config = read_config(folder)
    if path is not None:
        _check_same(folder, config, policy)
    config.num_labels = 1
    model = _read_weights(folder, config, dtype, fresh=path is None) if weights else _bare(config, dtype)
    if not model._supports_attention_backend:
        raise ConfigError(
            f"critic {folder}: {type(model).__name__} does not take an attention function in transformers"
        )
    model.config.use_cache = False
    return model.to(resolve_device(device)).eval()


def token_values(critic: PreTrainedModel, pack: Pack) -> Tensor:
    """V of the state before each of the pack's tokens: [T] fp32."""
    hidden = hidden_states(critic, pack.ids, pack.positions, pack.attention).index_select(0, pack.predictors)
    head = critic.get_submodule(HEAD)
    bias = head.bias.float() if head.bias is not None else None
    return linear(hidden.float(), head.weight.float(), bias)[:, 0]


def folder_settings(critic: PreTrainedModel) -> dict[str, Any]:
    """What a critic's config.json says beyond that of the folder it was started from."""
    return {"architectures": [type(critic).__name__], "id2label": {"0": "value"}, "label2id": {"value": 0}}


def _read_weights(folder: Path, config: PretrainedConfig, dtype: str, *, fresh: bool) -> PreTrainedModel:
    unreadable = f"critic {folder}: cannot be read as a critic"
    with quiet():
        model, missing = read_weights(AutoModelForTokenClassification, folder, config, dtype, unreadable=unreadable)
    if fresh:
        head = model.get_submodule(HEAD)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
        missing = [name for name in missing if not name.startswith(f"{HEAD}.")]
    refuse_missing(missing, f"critic {folder}")
    return model


def _bare(config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    with quiet(), no_init_weights():
        return AutoModelForTokenClassification.from_config(config, dtype=DTYPES[dtype], attn_implementation=NAME)


def _check_same(folder: Path, config: PretrainedConfig, policy: Path) -> None:
    """Raises `ConfigError` with both sides of the first difference between a critic and its policy."""
    kind = (config.architectures or ["nothing"])[0]
    if not kind.endswith("ForTokenClassification") or config.num_labels != 1:
        raise ConfigError(
            f"critic.path: {folder} is a {kind} of {config.num_labels} labels, expected a token classification model "
            "of one label, as `headrace pretrain-critic` writes it"
        )
    other = read_config(policy)
    for name in SAME:
        got, expected = getattr(config, name, None), getattr(other, name, None)
        if got != expected:
            raise ConfigError(
                f"critic.path: {folder} has {name} = {got}, the policy {policy} has {expected}; expected a critic of the same "
                "architecture"
            )
    if _vocabulary(folder) != _vocabulary(policy):
        raise ConfigError(
            f"critic.path: {folder} and the policy {policy} have different tokenizers (tokenizer.json); expected the same tokens"
        )


def _vocabulary(folder: Path) -> dict[str, Any]:
    """What decides a tokenizer's tokens; nothing where there is none."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from error
    return {name: data.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
