"""What cannot be right in `generator.engine`; the engine itself is asked when it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from urllib.parse import urlsplit

from engine.config import GeneratorConfig, SglangEngine, TorchEngine


def generator_engine(generator: GeneratorConfig) -> Iterator[str]:
    engine = generator.engine
    if isinstance(engine, TorchEngine):
        return
    for name, got in (("start_s", engine.start_s), ("deadline_s", engine.deadline_s)):
        if not 0 < got < math.inf:
            yield f"generator.engine.{name}: got {got}, expected a positive number"
    if not isinstance(engine, SglangEngine):
        return
    if engine.stream_interval < 1:
        yield f"generator.engine.stream_interval: got {engine.stream_interval}, expected at least 1"
    if engine.address is None:
        return
    if urlsplit(engine.address).scheme != "http" or urlsplit(engine.address).hostname is None:
        yield f"generator.engine.address: got {engine.address!r}, expected http://HOST:PORT"
    if generator.count > 1:
        yield (
            f"generator.count = {generator.count}, but the server at generator.engine.address = {engine.address} "
            "serves one generator; leave address out, so that each starts its own, or set count to 1"
        )
    if engine.options or engine.python:
        yield "generator.engine: got address, and python or options for a server that is started; expected one or the other"
