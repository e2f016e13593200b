"""Before DeepSpeed is imported: is it there, in a version that this was written for, and what its environment must say."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

from engine.config import ConfigError

SERIES = "0.19"
"""Its inside is used for the gradient's norm and for the optimizer's state, so other series may differ."""


def installed_version() -> str:
    """The version of DeepSpeed. Raises `ConfigError` where there is none, or one of another series."""
    try:
        found = version("deepspeed") if importlib.util.find_spec("deepspeed") is not None else None
    except PackageNotFoundError:
        found = None
    if found is None:
        raise ConfigError(
            f'learner.backend.type = "deepspeed": DeepSpeed is not installed here, expected version {SERIES}: '
            "DS_BUILD_OPS=0 pip install --no-build-isolation -e '.[deepspeed]'"
        )
    if not found.startswith(f"{SERIES}."):
        raise ConfigError(f'learner.backend.type = "deepspeed": got DeepSpeed {found}, expected version {SERIES}')
    return found


def set_environment(device: str) -> None:
    """DeepSpeed reads these when it is imported. What somebody has set already stays."""
    os.environ.setdefault("DS_ACCELERATOR", device.partition(":")[0])
    os.environ.setdefault("LOCAL_RANK", "0")  # torchrun sets it; without ranks there is one
