"""Whole runs with vLLM generators, as a user starts them: alone, and two of them beside one of our own."""

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

pytestmark = [cases.needs_vllm, pytest.mark.timeout(1200)]
RUN = "quickstart-vllm"
CONFIG = f"configs/{RUN}.toml"
ON_POLICY = {"buffer.max_lag": 0, "learner.updates_per_step": 1}
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


def versions_by_worker(folder: Path) -> dict[str, set[int]]:
    """The versions of the weights under which each generator sampled what was trained."""
    with closing(Log.open(folder / "rollouts.db")) as log:
        rows = log.query("SELECT worker, versions FROM rollouts")
    found: dict[str, set[int]] = {}
    for worker, versions in rows:
        found.setdefault(worker, set()).update(version for version, _ in json.loads(versions))
    return found


@pytest.mark.parametrize("stages", [1, 2])
def test_a_run_whose_generator_is_vllm(tmp_path: Path, stages: int) -> None:
    engine = {"generator.count": 1, "generator.engine.pipeline_parallel": stages}
    check_alone(CONFIG, overrides(tmp_path, **ON_POLICY, **engine), tmp_path / RUN)


def test_two_of_vllm_and_one_of_ours_feed_one_run(tmp_path: Path) -> None:
    """Ours joins once both of vLLM's have begun; the run is stopped when trained steps hold responses of all."""
    engine = {"generator.engine.slots": 8, "generator.engine": '{type="torch", slots=8}'}
    ours = [*COMMAND, "generator", CONFIG, "--name", "ours", *overrides(tmp_path, **engine)]
    options = overrides(tmp_path, **{"generator.count": 2, "steps": 5000})
    launch = [*COMMAND, "launch", "--no-view", CONFIG, *options]
    run_with_ours(launch, ours, tmp_path / RUN, {"generator-0", "generator-1"})


def check_alone(config: str, options: list[str], folder: Path) -> None:
    """A run with one generator ends by itself. On policy, every token is trained under the weights that sampled it, and the
    engine's log-probabilities are those of the learner."""
    command = [*COMMAND, "launch", "--no-view", config, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    found = versions_by_worker(folder)
    assert set(found) == {"generator-0"}
    assert max(found["generator-0"]) >= 5
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "kl_behaviour" in row]
    assert len(steps) == 6
    for row in steps:
        assert row["lag_max"] == 0
        assert abs(row["kl_behaviour"]) < 1e-5
        assert row["ratio_p01"] == pytest.approx(1.0, abs=1e-4)
    audit = subprocess.run([*COMMAND, "audit", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def run_with_ours(launch: list[str], ours: list[str], folder: Path, first: set[str]) -> None:
    """Starts `ours` once the run has trained on all of `first`, and interrupts the run once it has trained on ours too."""
    with open(folder.parent / "output", "w+") as output:
        run = subprocess.Popen(launch, cwd=ROOT, stdout=output, stderr=output)
        other = None
        try:
            until(lambda: trained_by(folder) == first, run, 600.0)
            other = subprocess.Popen(ours, cwd=ROOT, stdout=output, stderr=output)
            until(lambda: trained_by(folder) == first | {"ours"}, run, 200.0)
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130
        finally:
            for process in filter(None, (run, other)):
                process.kill()
                process.wait()


def trained_by(folder: Path) -> set[str]:
    path = folder / "rollouts.db"
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
