"""Whole runs with vLLM generators, as a user starts them: two of them, and one beside one of our own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import vllm_cases as cases

from protocols.log import Log

pytestmark = [cases.needs_vllm, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "workers.cli"]
SMALL = {
    "steps": 6, "learner.checkpoint_every": 3, "buffer.groups_per_step": 4, "buffer.samples_per_group": 4,
    "eval.prompts": 8, "eval.samples": 1, "eval.every": 0, "generator.engine.slots": 16,
}  # fmt: skip


def overrides(folder: Path, **more: object) -> list[str]:
    """Fresh weights instead of the cold start, few steps, everything under `folder`."""
    values = {"runs": f'"{folder}"', "cold_start": '""', "buffer.dynamic_sampling": "false", **SMALL, **more}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def versions_by_worker(folder: Path, run: str = "quickstart-vllm") -> dict[str, set[int]]:
    """The versions of the weights under which each generator sampled what was trained."""
    with closing(Log.open(folder / run / "rollouts.db")) as log:
        rows = log.query("SELECT worker, versions FROM rollouts")
    found: dict[str, set[int]] = {}
    for worker, versions in rows:
        found.setdefault(worker, set()).update(version for version, _ in json.loads(versions))
    return found


def test_two_vllm_generators_feed_a_run(tmp_path: Path) -> None:
    command = [*COMMAND, "launch", "--no-view", "configs/quickstart-vllm.toml", *overrides(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    found = versions_by_worker(tmp_path)
    assert set(found) == {"generator-0", "generator-1"}
    assert max(map(max, found.values())) >= 5


def test_one_of_vllm_and_one_of_ours_feed_one_run(tmp_path: Path) -> None:
    """Ours joins once vLLM's has begun; the run is stopped when trained steps hold responses of both."""
    options = overrides(tmp_path, **{"generator.count": 1, "steps": 5000})
    engine = {"generator.engine.slots": 8, "generator.engine": '{type="torch", slots=8}'}
    ours = [*COMMAND, "generator", "configs/quickstart-vllm.toml", "--name", "ours", *overrides(tmp_path, **engine)]
    launch = [*COMMAND, "launch", "--no-view", "configs/quickstart-vllm.toml", *options]
    with open(tmp_path / "output", "w+") as output:
        run = subprocess.Popen(launch, cwd=ROOT, stdout=output, stderr=output)
        other = None
        try:
            until(lambda: "generator-0" in trained_by(tmp_path), run, 400.0)
            other = subprocess.Popen(ours, cwd=ROOT, stdout=output, stderr=output)
            until(lambda: trained_by(tmp_path) == {"generator-0", "ours"}, run, 200.0)
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130
        finally:
            for process in filter(None, (run, other)):
                process.kill()
                process.wait()


def trained_by(folder: Path, run: str = "quickstart-vllm") -> set[str]:
    path = folder / run / "rollouts.db"
    if not path.exists():
        return set()
    with closing(Log.open(path)) as log:
        rows = log.query(
            "SELECT DISTINCT worker FROM rollouts JOIN groups ON groups.id = group_id WHERE status = 'trained'"
        )
    return {worker for (worker,) in rows}


def until(condition: Callable[[], object], run: subprocess.Popen, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
