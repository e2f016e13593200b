"""The whole pipeline as a user starts it: real processes, a real (tiny) model, real data, from one command."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from engine.checkpoint import load_checkpoint
from engine.models import load_model, named_weights
from engine.weights import fingerprints, weights_hash
from protocols.log import Log

MODEL = """
[model]
type = "new"
alphabet = " =abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'-_.,"
hidden = 64
layers = 2
heads = 2
kv_heads = 1
intermediate = 128
context = 64

[[tasks]]
type = "reasoning-gym"
dataset = "spell_backward"
params = { min_word_len = 3, max_word_len = 4 }
size = 2000
prompt = "{metadata[word]} ="
solution = "{answer}"
chat = false
extract = "whole"
held_out = 32
"""
FIRST = """
name = "first"
steps = 60
runs = "FOLDER"
MODEL
[objective]
type = "sft"
[buffer]
groups_per_step = 32
prompt_tokens = 32
[learner]
lr = 3e-3
warmup_steps = 5
checkpoint_every = 60
"""
SECOND = """
name = "second"
steps = 4
runs = "FOLDER"
cold_start = "FOLDER/first.toml"
MODEL
[objective]
type = "dapo"
[buffer]
groups_per_step = 4
samples_per_group = 4
prompt_tokens = 32
[generator]
count = 2
sampling = { max_tokens = 8 }
engine = { type = "torch", slots = 16 }
[learner]
lr = 1e-4
checkpoint_every = 2
[eval]
prompts = 8
"""


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.cli", "launch", "--no-view", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cold start and four steps of DAPO on top of it."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name, text in (("first", FIRST), ("second", SECOND)):
        filled = text.replace("FOLDER", str(folder)).replace("MODEL", MODEL)
        (folder / f"{name}.toml").write_text(filled, encoding="utf-8")
    done = launch(str(folder / "second.toml"))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "held-out accuracy" in done.stdout
    return folder


def test_every_trained_group_was_informative_and_trained_once(runs: Path) -> None:
    with Log.open(runs / "second" / "rollouts.db") as log:
        assert log.last_step() == 4
        trained = [group for step in range(1, 5) for group in log.plan(step) or []]
        assert len(trained) == len(set(trained)) == 16
        for group in trained:
            verdicts = {grade.correct for grade in log.grades(group) if grade.verdict == "graded"}
            assert verdicts == {True, False}
        assert {row.status for row in log.groups(kind="eval")} == {"evaluated"}
        assert [e["eval_step"] for e in log.evaluations()] == [0, 4]


def test_both_generators_shared_the_work(runs: Path) -> None:
    with Log.open(runs / "second" / "rollouts.db") as log:
        workers = {worker for (worker,) in log.query("SELECT DISTINCT worker FROM rollouts")}
    assert workers == {"generator-0", "generator-1"}


def test_the_last_checkpoint_has_the_weights_that_the_log_names(runs: Path) -> None:
    """Also after the cold start, whose buffer says goodbye at the moment of the last commit."""
    for name, step in (("first", 60), ("second", 4)):
        checkpoint = runs / name / "checkpoints" / f"step-{step:06d}"
        weights, _, meta = load_checkpoint(checkpoint)
        with Log.open(runs / name / "rollouts.db") as log:
            committed = log.step(step)
        assert committed is not None
        model = load_model(checkpoint, dtype="float32", device="cpu")
        assert meta["weights_hash"] == committed.weights_hash == weights_hash(fingerprints(named_weights(model)))
        assert set(load_file(checkpoint / "model.safetensors")) == set(weights)


def test_resume_goes_on_from_the_log_and_an_old_run_is_not_overwritten(runs: Path) -> None:
    config = runs / "second.toml"
    refused = launch(str(config))
    assert refused.returncode == 2
    assert "holds a run already" in refused.stderr
    resumed = launch(str(config), "--resume", "--set", "steps=6")
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    with Log.open(runs / "second" / "rollouts.db") as log:
        assert log.last_step() == 6
        groups = [row.source_index for row in log.groups(kind="train")]
        assert len(groups) == len(set(groups)), "a prompt of the stream was drawn twice"
    lines = (runs / "second" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["step"] for row in map(json.loads, lines) if "step" in row] == [1, 2, 3, 4, 5, 6]


def replay(run: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.cli", "replay", str(run), "--verify"]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_replay_comes_to_the_weights_that_the_log_names(runs: Path) -> None:
    """The run that was continued, whose steps have two configs."""
    found = replay(runs / "second")
    assert found.returncode == 0, found.stderr + found.stdout
    assert "6 steps verified (1 to 6)" in found.stdout


def test_replay_of_a_learner_with_two_ranks(runs: Path) -> None:
    done = launch(str(runs / "second.toml"), "--set", "name=ranks", "--set", "learner.ranks=2", "--set", "steps=2")
    assert done.returncode == 0, done.stderr + done.stdout
    found = replay(runs / "ranks")
    assert found.returncode == 0, found.stderr + found.stdout
    assert "2 steps verified (1 to 2)" in found.stdout
    with sqlite3.connect(runs / "ranks" / "rollouts.db") as connection:
        connection.execute(
            "UPDATE grades SET reward = 9 WHERE (group_id, sample) = (SELECT group_id, 0 FROM plan LIMIT 1)"
        )
    connection.close()
    found = replay(runs / "ranks")
    assert found.returncode == 1, found.stderr + found.stdout
    assert "step 1 differs" in found.stdout
