"""The generator on top of vLLM: vLLM's batching and kernels, weights applied between two of its steps.

Draws are those of `engine.sampling`, so this and our own generator can work on one run and continue each other's responses
as if there were one.
"""

from __future__ import annotations

from pathlib import Path

from engine.config import GeneratorConfig, VllmEngine
from engine.devices import resolve_device
from engine.generate_canary import Canary
from engine.generate_engine import EngineGenerator
from engine.generate_vllm_start import check_installed, set_environment
from engine.tensor_parallel import check_parallel
from engine.text import TextModel


def start_vllm(folder: Path, settings: GeneratorConfig, config: VllmEngine) -> EngineGenerator:
    """The generator without weights, its workers running. Raises `ConfigError` when vLLM, the model and the config do not
    fit one another, `EngineLost` when vLLM fails."""
    check_installed()
    canary = Canary(folder, settings.dtype)
    check_parallel(folder, canary.model.config, config.tensor_parallel, stages=config.pipeline_parallel)
    device = resolve_device(settings.device)
    set_environment(config, threads=settings.threads, device=device)
    from engine.generate_vllm_engine import Engine  # vLLM may be missing, and reads its environment when imported

    text = TextModel.load(folder)
    context = min(config.context or canary.context, canary.context)
    engine = Engine(
        folder,
        config,
        device=device,
        dtype=settings.dtype,
        context=context,
        stop_ids=sorted(text.stop_ids),
    )
    engine.attach(canary.stage)
    canary.stage.seal()
    return EngineGenerator(engine, canary, config=config, context=context, decode=text.decode)
