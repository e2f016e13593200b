"""The vLLM generator for the `generate` benchmark, where vLLM is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from engine.config import VllmEngine
from engine.generate_canary import Canary
from engine.generate_engine import EngineGenerator
from engine.generate_vllm_start import set_environment
from engine.models import named_weights


@contextmanager
def vllm_generator(model: PreTrainedModel, dtype: str, *, slots: int, threads: int) -> Iterator[EngineGenerator]:
    """One for `model` whose responses end by their length alone."""
    config = VllmEngine(slots=slots, kv_gb=1.0)
    set_environment(config, threads=threads, device="cpu")
    from engine.generate_vllm_engine import Engine  # vLLM reads its environment when imported

    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        canary = Canary(Path(folder), dtype)
        context = canary.context
        engine = Engine(Path(folder), config, device="cpu", dtype=dtype, context=context, stop_ids=[])
        try:
            engine.attach(canary.stage)
            generator = EngineGenerator(engine, canary, config=config, context=context, decode=lambda tokens: "")
            generator.load({name: tensor.detach() for name, tensor in named_weights(model).items()}, 0)
            yield generator
        finally:
            engine.close()
