"""Before an SGLang server serves: is it there, does it fit the model and the config, and how it is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from engine.config import ConfigError, SglangEngine
from engine.generate_sglang_http import Api

SESSIONS = {"0.5.20": False, "0.5.23": True}
"""The versions that this was tested with, and whether weights are updated between /begin_weight_update and /end_weight_update."""
VERSION_S = 60.0
COLDEST = 1e-6
"""Below this temperature SGLang takes the likeliest token and gives log-probabilities at temperature 1."""


def interpreter(config: SglangEngine) -> str:
    return config.python or sys.executable


def check_installed(config: SglangEngine) -> None:
    """Raises `ConfigError` unless a version of SGLang that this knows is installed for the interpreter."""
    python = interpreter(config)
    code = "from importlib.metadata import version; print(version('sglang'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=VERSION_S)
    except OSError as error:
        raise ConfigError(f"generator.engine.python: {python} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"generator.engine.python: {python} did not say within {VERSION_S:.0f} s what it has"
        ) from error
    expected = " or ".join(SESSIONS)
    if done.returncode != 0:
        raise ConfigError(
            f"generator.engine: sglang is not installed for {python}, expected version {expected}: "
            "`bash tools/test-engines sglang` shows how it is installed, and generator.engine.python names the interpreter"
        )
    check_version(done.stdout.strip(), python)


def check_version(found: str, where: str) -> None:
    """Raises `ConfigError` for a version of SGLang that this was not tested with."""
    if found not in SESSIONS:
        raise ConfigError(f"generator.engine: got sglang {found} ({where}), expected version {' or '.join(SESSIONS)}")


def command(folder: Path, config: SglangEngine, *, port: int, device: str, dtype: str, context: int) -> list[str]:
    """What starts the server."""
    arguments = {
        "model-path": folder,
        "host": "127.0.0.1",
        "port": port,
        "device": device,
        "dtype": dtype,
        "tp-size": config.tensor_parallel,
        "context-length": context,
        "max-running-requests": config.slots + 1,  # the canary always finds a place
        "mem-fraction-static": config.gpu_memory,
        "load-format": "dummy",  # weights come from the learner
        "model-impl": "sglang",  # what it does not know it would serve through transformers, under other names
        "stream-interval": config.stream_interval,
        "log-level": "warning",
    }
    flags = ["skip-tokenizer-init", "skip-server-warmup", "incremental-streaming-output", "sleep-on-idle"]
    if config.on_new_weights == "keep":
        flags.append("disable-overlap-schedule")
    given = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    return [interpreter(config), *config.launcher, *given, *(f"--{flag}" for flag in flags), *config.options]


def environment(device: str, threads: int) -> dict[str, str]:
    """What the server's has besides ours."""
    on_cpu = {"SGLANG_USE_CPU_ENGINE": "1"} if device == "cpu" else {}
    return {
        **on_cpu,
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "0",
        "OMP_NUM_THREADS": str(threads),  # several generators share a machine
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
    }


def check_server(api: Api, folder: Path, config: SglangEngine, *, dtype: str, context: int, architecture: str) -> bool:
    """Whether weights are updated in sessions. Raises `ConfigError` for a server that is not what the config says, and
    `EngineLost` when it does not answer."""
    info, model = api.get("/server_info"), api.get("/model_info")
    check_version(str(info.get("version")), api.base)
    found = model.get("architectures")
    if found != [architecture]:
        raise ConfigError(f"generator.engine: SGLang at {api.base} serves {found}, but {folder} is a {architecture}")
    for key, ours, name, start in _settings(config, dtype):
        if info.get(key) != ours:
            raise ConfigError(
                f"{name} is {ours}, but SGLang at {api.base} runs with {key} = {info.get(key)!r}; start it with {start}"
            )
    served = info.get("context_length")
    if served is not None and int(served) < context:
        raise ConfigError(
            f"generator.engine.context: {context} tokens are to be served, but SGLang at {api.base} takes {served}"
        )
    return SESSIONS[str(info["version"])]


def _settings(config: SglangEngine, dtype: str) -> list[tuple[str, Any, str, str]]:
    """The server's word for it, what it must be, ours, and how the server gets it."""
    settings: list[tuple[str, Any, str, str]] = [
        ("dtype", dtype, "generator.dtype", f"--dtype {dtype}"),
        ("tp_size", config.tensor_parallel, "generator.engine.tensor_parallel", f"--tp-size {config.tensor_parallel}"),
    ]
    if (
        config.on_new_weights == "keep"
    ):  # otherwise a token is under way when the server stands still, and labelled wrongly
        name = 'with generator.engine.on_new_weights = "keep", disable_overlap_schedule'
        settings.append(("disable_overlap_schedule", True, name, "--disable-overlap-schedule"))
    return settings
