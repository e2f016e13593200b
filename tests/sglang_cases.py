"""What the tests of the SGLang generator share: a server that speaks its interface, the real one where it is installed, and
generators on either."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import GeneratorConfig, SglangEngine
from engine.generate_engine import EngineGenerator
from engine.generate_sglang import start_sglang
from protocols.messages import Sampling

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests/fake_sglang.py")
PYTHON = Path(os.environ.get("HEADRACE_SGLANG_PYTHON", ROOT / ".venv-sglang/bin/python"))
needs_sglang = pytest.mark.skipif(
    not PYTHON.exists(),
    reason=f"{PYTHON} is not there; `bash tools/test-engines sglang` makes an environment with SGLang and runs these tests",
)
REAL = {
    "python": str(PYTHON),
    "launcher": (str(ROOT / "tests/sglang_cpu.py"),),
    "options": ("--attention-backend", "torch_native", "--max-total-tokens", "16384"),
    "gpu_memory": 0.3,
}
"""The real server on a CPU."""


def interpreter(folder: Path, version: str = "0.5.20") -> str:
    """This interpreter, with the word of an installed package that it has SGLang of this version."""
    package = folder / f"sglang-{version}" / f"sglang-{version}.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    script = folder / f"python-{version}"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}:{package.parent} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return str(script)


def engine(folder: Path, *, version: str = "0.5.20", options: tuple[str, ...] = (), **settings: object) -> SglangEngine:
    """Of the fake server; `folder` is for files of ours."""
    settings = {"slots": 8, "deadline_s": 20.0, "start_s": 120.0} | settings
    more = ("--version", version, *(["--session"] if version != "0.5.20" else []), *options)
    return SglangEngine(python=interpreter(folder, version), launcher=(FAKE,), options=more, **settings)


def start(model: Path, config: SglangEngine, *, temperature: float = 1.0) -> EngineGenerator:
    sampling = Sampling(max_tokens=8, temperature=temperature)
    return start_sglang(model, GeneratorConfig(sampling=sampling, engine=config, device="cpu"), config)


def children(parent: int) -> list[int]:
    """All processes below this one."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, timeout=20, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    below = [pid for pid, above in pairs if above == parent]
    return below + [deeper for pid in below for deeper in children(pid)]


def server_of(generator: EngineGenerator) -> int:
    """The process of the server's leash."""
    return generator._engine._server.pid
