"""A run whose learner is sharded, as a user starts it: policy and critic on two ranks, replayed, and continued on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_deepspeed import needs_deepspeed
from test_pipeline import MODEL, SECOND, launch, replay
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from engine.models import named_weights
from engine.weights import fingerprints, weights_hash
from protocols.log import Log
from workers.trainer import CRITIC_PREFIX

SHARDED = [
    "steps=3", "learner.ranks=2", 'learner.backend={type="deepspeed", zero=3, whole_below=0}', "generator.count=1",
    "buffer.groups_per_step=12", 'objective={type="vcppo"}', "critic={lr=1e-3, pretrain_steps=1}",
    "buffer.dynamic_sampling=false", "eval.prompts=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    text = SECOND.replace('cold_start = "FOLDER/first.toml"', "").replace("FOLDER", str(folder)).replace("MODEL", MODEL)
    (folder / "second.toml").write_text(text, encoding="utf-8")
    done = launch(str(folder / "second.toml"), *(f"--set={setting}" for setting in SHARDED))
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "second"


@needs_deepspeed
def test_its_checkpoint_is_a_folder_of_transformers_with_the_weights_of_the_log(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step-000003"
    policy = AutoModelForCausalLM.from_pretrained(checkpoint)
    critic = AutoModelForTokenClassification.from_pretrained(checkpoint / "critic")
    found = fingerprints(named_weights(policy))
    found |= {f"{CRITIC_PREFIX}{name}": value for name, value in fingerprints(named_weights(critic)).items()}
    with Log.open(run / "rollouts.db") as log:
        committed = log.step(3)
    assert committed is not None
    assert weights_hash(found) == committed.weights_hash
    assert json.loads((checkpoint / "headrace.json").read_text())["meta"]["weights_hash"] == committed.weights_hash


@needs_deepspeed
def test_replay_comes_to_the_weights_that_the_log_names(run: Path) -> None:
    found = replay(run)
    assert found.returncode == 0, found.stderr + found.stdout
    assert "3 steps verified (1 to 3)" in found.stdout


@needs_deepspeed
def test_a_critic_is_pretrained_on_its_log_by_two_ranks(run: Path) -> None:
    out = run.parent / "critic"
    command = [sys.executable, "-m", "workers.cli", "pretrain-critic", str(run), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    assert AutoModelForTokenClassification.from_pretrained(out).num_labels == 1
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert curve[-1]["step"] == 1
    assert curve[-1]["value_loss"] != curve[0]["value_loss"]


@needs_deepspeed
def test_another_number_of_ranks_and_another_stage_go_on(run: Path) -> None:
    changed = [*SHARDED, "steps=4", "learner.ranks=1", 'learner.backend={type="deepspeed", zero=2}']
    resumed = launch(str(run.parent / "second.toml"), "--resume", *(f"--set={setting}" for setting in changed))
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    with Log.open(run / "rollouts.db") as log:
        assert log.last_step() == 4
