"""`headrace plan` as a user meets it: GPUs shared out by formulas, a real recorded run predicted, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import ConfigError
from protocols.log import Log
from tools.benchmarks.overlap import Bench
from tools.experiments.plan_runs import SLOTS, Case, record
from workers.plan.check import compare, error
from workers.plan.hardware import GPUS, MODELS, Assumptions, least_learner, machines, tensor_parallel
from workers.plan.recorded import _passes

ROOT = Path(__file__).parent.parent
PAPER = str(ROOT / "configs" / "dapo-qwen2.5-32b.toml")
SMALL = (
    "--set", "buffer.groups_per_step=16", "--set", "buffer.max_lag=1", "--steps", "8", "--lengths", "median=200",
    "--lengths", "longest=2000",
)  # fmt: skip


def headrace(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "workers.cli", "plan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of real processes whose generator is paced by the clock."""
    folder = tmp_path_factory.mktemp("plan")
    Bench(folder, SLOTS, 1).prepare()
    return record(Case("short", lag=1, generators=1, groups=2, pace=300.0, steps=14), folder)


def test_gpus_are_shared_out_and_the_proposed_split_is_the_quickest(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = headrace(PAPER, "--gpus", "16xh100", "--model", "7b", *SMALL, "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "formulas, not measured" in done.stdout
    assert "proposed: learner" in done.stdout
    found = json.loads(out.read_text())
    seconds = [option["forecast"]["figures"]["step_seconds"] for option in found]
    assert seconds[0] <= 1.01 * min(seconds)
    for option in found:
        assert option["learner"] + option["generators"] * option["gpus_each"] <= 16
        # What every simulation obeys: no step is quicker than either side alone, lengths being drawn anew.
        alone = max(option["generate_seconds"], option["train_seconds"])
        assert option["forecast"]["figures"]["step_seconds"] > 0.8 * alone


def test_a_recorded_run_is_predicted_from_its_parts(run: Path, tmp_path: Path) -> None:
    with Log.open(run / "rollouts.db") as log:
        found = compare(log, part=1.0)
    # This machine may be busy with other work meanwhile; the ten runs of tools/experiments/plan_check are the evidence.
    assert found.errors["step_seconds"] < 0.3, found
    assert found.errors["tokens_per_second"] < 0.3, found
    out = tmp_path / "check.json"
    strict = headrace("--check", str(run), "--limit", "0", "--json", str(out))
    assert (strict.returncode, "recorded and predicted" in strict.stdout) == (1, True), strict.stderr
    assert json.loads(out.read_text())["calibrated"] == [2, 5]
    assert headrace("--check", str(run), "--limit", "1000").returncode == 0


def test_a_plan_takes_costs_and_lengths_from_a_run(run: Path, tmp_path: Path) -> None:
    config, out = str(run.parent / "overlap.toml"), tmp_path / "plan.json"
    done = headrace(config, "--from", str(run), "--gpus", "4", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "costs: measured in" in done.stdout
    assert {option["learner"] for option in json.loads(out.read_text())} == {1, 2, 3}
    assert headrace(config, "--from", str(run)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "expected a CONFIG, or --check RUN"),
        ((PAPER,), "expected --gpus 64xh100, or --from RUN"),
        ((PAPER, "--gpus", "64xh1000"), "--gpus '64xh1000': expected a number"),
        ((PAPER, "--gpus", "64", "--model", "7b"), "got a number alone"),
        ((PAPER, "--gpus", "4xl40s", "--model", "72b"), "too few for a learner and one generator"),
        ((PAPER, "--gpus", "64xh100", "--model", "8q"), "--model 8q: expected one of 0.5b"),
        ((PAPER, "--gpus", "64xh100", "--model", "7b", "--cost", "mfu=2"), "--cost"),
        ((PAPER, "--gpus", "64xh100", "--model", "7b", "--cost", "speed=2"), "['speed'], expected of mfu"),
        ((PAPER, "--gpus", "64xh100", "--model", "7b", "--lengths", "keep=0"), "keep above 0"),
        (("--check", "nosuch"), "nosuch: no such run"),
        (("configs/quickstart-sft.toml", "--gpus", "8xh100"), "nothing to plan"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(arguments: tuple[str, ...], expected: str) -> None:
    done = headrace(*arguments)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- parts ---------------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_published_models() -> None:
    wanted = {"0.5b": 0.494, "1.5b": 1.544, "3b": 3.086, "7b": 7.616, "14b": 14.77, "32b": 32.76, "72b": 72.71}
    assert {name: shape.parameters / 1e9 for name, shape in MODELS.items()} == pytest.approx(wanted, rel=2e-3)


def test_a_model_takes_as_many_gpus_as_its_memory_needs() -> None:
    h100 = GPUS["h100"]
    assert [tensor_parallel(MODELS[name], h100) for name in ("0.5b", "7b", "32b", "72b")] == [1, 1, 2, 4]
    assert least_learner(MODELS["7b"], h100) == 3
    assert (machines("64xH100").count, machines("8").kind) == (64, None)
    with pytest.raises(ConfigError, match="expected a number"):
        machines("1xh100")
    with pytest.raises(ValueError, match="shares above 0"):
        Assumptions(mfu=0.0)


def test_passes_are_measured_as_a_line_over_the_live_sequences() -> None:
    """Responses at 10 ms and 1 ms for each sequence beside: 1 alone, then 4 together, then 8."""
    spans, now = [], 0.0
    for live in (1, 4, 8):
        for _ in range(5):
            spans += [[now, now + 50 * (0.01 + 0.001 * live), 50.0]] * live
            now = spans[-1][1]
    found = _passes(np.array(spans), np.ones(len(spans), dtype=bool), 8)
    assert [count for count, _ in found] == [1, 8]
    assert [seconds for _, seconds in found] == pytest.approx([0.011, 0.018], rel=1e-6)


def test_errors_are_relative_and_those_of_small_shares_three_times_the_difference() -> None:
    assert error("step_seconds", 2.0, 2.2) == pytest.approx(0.1)
    assert error("learner_idle", 0.02, 0.03) == pytest.approx(0.03)
    assert error("learner_idle", 0.8, 0.72) == pytest.approx(0.1)
    assert error("lag_mean", 0.0, 0.01) == pytest.approx(0.1)
