"""The generator on top of an SGLang server, started here or given by its address.

Draws are SGLang's own: responses are not functions of their tickets, but their log-probabilities and versions are exact, and
other generators continue what this one hands back.
"""

from __future__ import annotations

from pathlib import Path

from engine.config import ConfigError, GeneratorConfig, SglangEngine
from engine.devices import resolve_device
from engine.generate_canary import Canary
from engine.generate_engine import EngineGenerator
from engine.generate_sglang_engine import Engine
from engine.generate_sglang_http import Api
from engine.generate_sglang_server import HOST, Server, free_port, wait_ready
from engine.generate_sglang_start import COLDEST, check_installed, check_server, command, environment
from engine.tensor_parallel import check_parallel
from engine.text import TextModel


def start_sglang(folder: Path, settings: GeneratorConfig, config: SglangEngine) -> EngineGenerator:
    """The generator without weights, its server running. Raises `ConfigError` when SGLang, the model and the config do not
    fit one another, `EngineLost` when SGLang fails."""
    if settings.sampling.temperature < COLDEST:
        raise ConfigError(
            f"generator.sampling.temperature: got {settings.sampling.temperature}, expected at least {COLDEST}: below, "
            "SGLang gives log-probabilities of another distribution than it draws from"
        )
    canary, text = Canary(folder, settings.dtype), TextModel.load(folder)
    context = min(config.context or canary.context, canary.context)
    engine = start_engine(folder, settings, config, canary=canary, context=context, stop_ids=sorted(text.stop_ids))
    return EngineGenerator(engine, canary, config=config, context=context, decode=text.decode)


def start_engine(
    folder: Path, settings: GeneratorConfig, config: SglangEngine, *, canary: Canary, context: int, stop_ids: list[int]
) -> Engine:
    """The engine alone, which takes weights from the canary's stage. Raises as `start_sglang`."""
    if config.address is None:
        check_installed(config)
    check_parallel(folder, canary.model.config, config.tensor_parallel)
    base, server = config.address, None
    if base is None:
        port, device = free_port(), resolve_device(settings.device)
        line = command(folder, config, port=port, device=device, dtype=settings.dtype, context=context)
        base, server = f"http://{HOST}:{port}", Server(line, environment(device, settings.threads))
    api = Api(base, deadline_s=config.deadline_s)
    architecture = type(canary.model).__name__
    try:
        wait_ready(api, server, config.start_s)
        session = check_server(api, folder, config, dtype=settings.dtype, context=context, architecture=architecture)
        engine = Engine(api, server, config=config, stop_ids=stop_ids, session=session)
        engine.attach(canary.stage, folder)
    except BaseException:  # also Ctrl-C: the server is not the terminal's to end
        if server is not None:
            server.kill()
        api.close()
        raise
    canary.stage.seal()
    return engine
