"""Whole runs with a real SGLang generator, as a user starts them: alone, and beside one of our own."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import sglang_cases
from test_vllm_pipeline import COMMAND, ROOT, overrides, trained_by, until, versions_by_worker

pytestmark = [sglang_cases.needs_sglang, pytest.mark.timeout(1200)]
RUN = "quickstart-sglang"
CONFIG = f"configs/{RUN}.toml"


def real(folder: Path, **more: object) -> list[str]:
    """On the server of the tests."""
    engine = {f"generator.engine.{key}": json.dumps(value) for key, value in sglang_cases.REAL.items()}
    return overrides(folder, **engine, **more)


def test_a_run_whose_generator_is_sglang(tmp_path: Path) -> None:
    """With max_lag 0 and one update a step every token is trained under the weights that sampled it: SGLang's
    log-probabilities are those of the learner."""
    on_policy = {"buffer.max_lag": 0, "learner.updates_per_step": 1}
    command = [*COMMAND, "launch", "--no-view", CONFIG, *real(tmp_path, **on_policy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    found = versions_by_worker(tmp_path, RUN)
    assert set(found) == {"generator-0"}
    assert max(map(max, found.values())) >= 5
    rows = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "kl_behaviour" in row]
    assert len(steps) == 6
    for row in steps:
        assert row["lag_max"] == 0
        assert abs(row["kl_behaviour"]) < 1e-5
        assert row["ratio_p01"] == pytest.approx(1.0, abs=1e-4)
    audit = subprocess.run(
        [*COMMAND, "audit", str(tmp_path / RUN)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_one_of_sglang_and_one_of_ours_feed_one_run(tmp_path: Path) -> None:
    """Ours joins once SGLang's has begun; the run is stopped when trained steps hold responses of both."""
    engine = {"generator.engine": '{type="torch", slots=8}', "generator.engine.slots": 8}
    ours = [*COMMAND, "generator", CONFIG, "--name", "ours", *overrides(tmp_path, **engine)]
    launch = [*COMMAND, "launch", "--no-view", CONFIG, *real(tmp_path, steps=5000)]
    with open(tmp_path / "output", "w+") as output:
        run = subprocess.Popen(launch, cwd=ROOT, stdout=output, stderr=output)
        other = None
        try:
            until(lambda: "generator-0" in trained_by(tmp_path, RUN), run, 600.0)
            other = subprocess.Popen(ours, cwd=ROOT, stdout=output, stderr=output)
            until(lambda: trained_by(tmp_path, RUN) == {"generator-0", "ours"}, run, 200.0)
            run.send_signal(signal.SIGINT)
            assert run.wait(60) == 130
        finally:
            for process in filter(None, (run, other)):
                process.kill()
                process.wait()
