"""Hugging Face causal language models as this system uses them: one row of tokens in, hidden states out.

The output layer is applied by the callers (in chunks by the learner, to sampled positions only by the generator), so a
model is supported when its logits are exactly `hidden @ output_weight.T` and every layer attends to all earlier tokens.
Whatever breaks one of the two is refused when the model is loaded.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from engine.attention import ARGUMENT, NAME, Attention
from engine.characters import EOS, PAD, save_tokenizer
from engine.config import ConfigError, NewModel
from engine.devices import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTINGS = "headrace_model.json"


def load_model(path: str | Path, *, dtype: str, device: str, weights: bool = True) -> PreTrainedModel:
    """The model of a Hugging Face folder (one safetensors file or shards), in eval mode, all parameters of `dtype`.

    With `weights=False` no weights file is read or needed: parameters hold NaN until they are loaded, so that a model
    that is used too early cannot pass for a trained one. Raises `ConfigError` for a missing or broken folder and for
    an architecture that this system would compute wrongly.
    """
    path = Path(path)
    config = read_config(path)
    where = f"model {path}"
    target = resolve_device(device)
    with quiet():
        model = _causal_model(path, config, dtype) if weights else _architecture(config, dtype, where)
    _check_model(model, where)
    model = model.to(target)
    if not weights:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
    model.config.use_cache = False
    return model.eval()


def bare_model(path: str | Path, *, dtype: str) -> PreTrainedModel:
    """As `load_model`, on the CPU, with weights that nobody has written yet and that take no memory until then: they come
    from another rank."""
    path = Path(path)
    with quiet():
        model = _architecture(read_config(path), dtype, f"model {path}")
    _check_model(model, f"model {path}")
    model.config.use_cache = False
    return model.eval()


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
    """Final (normed) hidden states [N, H] of one row: `ids` [N] and `positions` [N] int64; `attention` decides which token
    attends to which. Logits are `hidden @ output_weight(model).T`."""
    output = model.base_model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, **{ARGUMENT: attention}
    )
    return output.last_hidden_state[0]


def output_weight(model: PreTrainedModel) -> Tensor:
    """The weight [V, H] of the output layer (with tied embeddings: the embedding's)."""
    return model.get_output_embeddings().weight


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters themselves by Hugging Face name, sorted by name; tied ones once, under the first name."""
    return dict(sorted(model.named_parameters()))


def create_model(config: NewModel, folder: str | Path, seed: int) -> None:
    """Write a small Llama with fresh weights and a tokenizer of one token a character, as a Hugging Face folder.

    A function of (config, seed). An existing folder is kept when it was made from the same two, else `ConfigError`.
    """
    folder = Path(folder)
    settings = {"model": msgspec.to_builtins(config), "seed": seed}
    if folder.exists():
        _check_same_settings(folder, settings)
        return
    model = _new_llama(config, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with quiet():
            model.save_pretrained(temporary)
        save_tokenizer(config.alphabet, temporary, context=config.context)
        (temporary / SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.exists():
                raise
            _check_same_settings(folder, settings)  # another process was first
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _new_llama(config: NewModel, seed: int) -> LlamaForCausalLM:
    if config.hidden % config.heads or (config.hidden // config.heads) % 2:
        raise ConfigError(
            f"model.hidden: got {config.hidden}, expected {config.heads} (model.heads) times an even number"
        )
    if config.kv_heads < 1 or config.heads % config.kv_heads:
        raise ConfigError(f"model.kv_heads: got {config.kv_heads}, expected a divisor of {config.heads} (model.heads)")
    llama = LlamaConfig(
        vocab_size=len(config.alphabet) + 2,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(llama)


def _check_same_settings(folder: Path, settings: dict) -> None:
    try:
        made_from = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model folder {folder}: exists but was not made by this command ({error})") from error
    if made_from != settings:
        raise ConfigError(
            f"model folder {folder}: made from {made_from}, expected {settings}; remove it or rename the run"
        )


def read_config(path: Path) -> PretrainedConfig:
    """The folder's config. Raises `ConfigError` for none, a broken one, and an architecture that is not supported."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"model {path}: no config.json there; expected a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {path}: config.json is not readable: {error}") from error
    _check_config(config, f"model {path}")
    return config


def _check_config(config: PretrainedConfig, where: str) -> None:
    if config.is_encoder_decoder:
        raise ConfigError(f"{where}: {config.model_type} is an encoder-decoder, expected a causal language model")
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise ConfigError(f"{where}: {name} = {getattr(config, name)} is not supported")
    for name in ("logits_scaling", "logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"{where}: {name} = {getattr(config, name)} is not supported, expected plain logits")
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        raise ConfigError(f"{where}: layers of type {sorted(set(layer_types))}, expected full_attention only")
    if layer_types is None and getattr(config, "sliding_window", None) is not None:
        raise ConfigError(f"{where}: sliding_window = {config.sliding_window} is not supported")


def _check_model(model: PreTrainedModel, where: str) -> None:
    output = model.get_output_embeddings()
    if output is None or model.base_model is model:
        raise ConfigError(f"{where}: {type(model).__name__} has no output layer over the vocabulary (lm_head)")
    if getattr(output, "bias", None) is not None:
        raise ConfigError(f"{where}: the output layer has a bias, which is not supported")
    if not model._supports_attention_backend:
        raise ConfigError(f"{where}: {type(model).__name__} does not take an attention function in transformers")


def read_weights(
    kind: type[AutoModelForCausalLM] | type[AutoModelForTokenClassification],
    folder: Path,
    config: PretrainedConfig,
    dtype: str,
    *,
    unreadable: str,
) -> tuple[PreTrainedModel, list[str]]:
    """A folder's model of this kind, and the names of the weights that its files lack, sorted. Raises `ConfigError`, whose
    text begins with `unreadable`."""
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=NAME,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{unreadable}: {error}") from error
    return model, sorted(report["missing_keys"])


def refuse_missing(missing: Sequence[str], where: str) -> None:
    """Raises `ConfigError` where weights are missing."""
    if missing:
        raise ConfigError(f"{where}: {len(missing)} weights are missing from its files, the first is {missing[0]}")


def _causal_model(path: Path, config: PretrainedConfig, dtype: str) -> PreTrainedModel:
    unreadable = f"model {path}: weights are not readable"
    model, missing = read_weights(AutoModelForCausalLM, path, config, dtype, unreadable=unreadable)
    refuse_missing(missing, f"model {path}")
    return model


def _architecture(config: PretrainedConfig, dtype: str, where: str) -> PreTrainedModel:
    # Parameters stay unwritten (the system then gives them no memory) but buffers such as the rotary frequencies are
    # computed, which building on the meta device would lose.
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation=NAME)
    except ValueError as error:
        raise ConfigError(f"{where}: {config.model_type} is not supported: {error}") from error
    model.tie_weights()
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports of what was loaded: several processes share the terminal with the live view, and what
    is missing is an error of ours."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
