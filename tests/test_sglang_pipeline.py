"""Whole runs with a real SGLang generator, as a user starts them: alone, and beside one of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sglang_cases
from test_vllm_pipeline import COMMAND, ON_POLICY, check_alone, overrides, run_with_ours

pytestmark = [sglang_cases.needs_sglang, pytest.mark.timeout(1200)]
RUN = "quickstart-sglang"
CONFIG = f"configs/{RUN}.toml"


def real(folder: Path, **more: object) -> list[str]:
    """On the server of the tests."""
    engine = {f"generator.engine.{key}": json.dumps(value) for key, value in sglang_cases.REAL.items()}
    return overrides(folder, **engine, **more)


def test_a_run_whose_generator_is_sglang(tmp_path: Path) -> None:
    check_alone(CONFIG, real(tmp_path, **ON_POLICY), tmp_path / RUN)


def test_one_of_sglang_and_one_of_ours_feed_one_run(tmp_path: Path) -> None:
    """Ours joins once SGLang's has begun; the run is stopped when trained steps hold responses of both."""
    engine = {"generator.engine": '{type="torch", slots=8}', "generator.engine.slots": 8}
    ours = [*COMMAND, "generator", CONFIG, "--name", "ours", *overrides(tmp_path, **engine)]
    launch = [*COMMAND, "launch", "--no-view", CONFIG, *real(tmp_path, steps=5000)]
    run_with_ours(launch, ours, tmp_path / RUN, {"generator-0"})
