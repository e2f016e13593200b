"""The SGLang generator for the `generate` benchmark, where an interpreter that has SGLang is named."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from engine.config import GeneratorConfig, SglangEngine
from engine.generate_canary import Canary
from engine.generate_engine import EngineGenerator
from engine.generate_sglang import start_engine
from engine.models import named_weights
from protocols.messages import Sampling

Dtype = Literal["float32", "bfloat16"]


@contextmanager
def sglang_generator(
    model: PreTrainedModel, dtype: Dtype, config: SglangEngine, *, threads: int
) -> Iterator[EngineGenerator]:
    """One for `model` whose responses end by their length alone."""
    settings = GeneratorConfig(
        sampling=Sampling(max_tokens=1), engine=config, device="auto", dtype=dtype, threads=threads
    )
    with tempfile.TemporaryDirectory() as folder:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        canary = Canary(Path(folder), dtype)
        context = canary.context
        engine = start_engine(Path(folder), settings, config, canary=canary, context=context, stop_ids=[])
        try:
            generator = EngineGenerator(engine, canary, config=config, context=context, decode=lambda tokens: "")
            generator.load({name: tensor.detach() for name, tensor in named_weights(model).items()}, 0)
            yield generator
        finally:
            engine.close()
