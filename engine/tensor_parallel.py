"""Into how many parts an engine can cut a model."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from engine.config import ConfigError


def check_parallel(folder: Path, model: PretrainedConfig, ranks: int, *, stages: int = 1) -> None:
    """Raises `ConfigError` for `generator.engine.tensor_parallel = ranks` that does not divide the model's heads or the width
    of its layers, and for `pipeline_parallel = stages` of which some would have no layer."""
    where = f"generator.engine.tensor_parallel = {ranks}"
    if ranks < 1:
        raise ConfigError(f"{where}: expected at least 1")
    sizes = {"attention heads": model.num_attention_heads, "intermediate": model.intermediate_size}
    for what, size in sizes.items():
        if size % ranks:
            raise ConfigError(f"{where} does not divide the {size} {what} of {folder}")
    layers = model.num_hidden_layers
    if not 1 <= stages <= layers:
        where = f"generator.engine.pipeline_parallel = {stages}"
        raise ConfigError(f"{where}: expected 1 to {layers}, the layers of {folder}")
    heads = model.num_key_value_heads
    if heads % ranks and ranks % heads:
        raise ConfigError(f"{where} neither divides nor is a multiple of the {heads} key-value heads of {folder}")
