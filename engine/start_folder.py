"""Which folder a run's model is taken from. No torch here."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config, ConfigError, NewModel, UtelModel, load_config


def policy_folder(config: Config) -> Path:
    """The Hugging Face folder that step 0 of this run starts from. Raises `ConfigError` when the cold start has not run."""
    if isinstance(config.model, UtelModel):
        return config.run_dir / "model"
    return start_folder(config) or config.run_dir / "model"


def start_folder(config: Config) -> Path | None:
    """The folder that the model is taken from; None for fresh weights. Raises `ConfigError` when the cold start has not run."""
    if config.cold_start:
        first = load_config(config.cold_start)
        checkpoints = sorted((first.run_dir / "checkpoints").glob("step-*[0-9]"))
        if not checkpoints:
            raise ConfigError(
                f"{config.source}: cold_start: no checkpoint in {first.run_dir}; run `headrace launch {config.cold_start}` first"
            )
        return checkpoints[-1]
    return None if isinstance(config.model, NewModel) or config.model.path is None else Path(config.model.path)
