"""Runs that could only go on for ever, or go on as another run: each ends with one error that says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import Config, ConfigError, load_config
from engine.models import create_model
from protocols.log import Log
from protocols.messages import Grade
from workers.intake import Intake
from workers.reward_watch import RewardsBroken, RewardWatch
from workers.run_state import RunState

ROOT = Path(__file__).parent.parent
CONFIG = """
name = "trial"
steps = 3
runs = "FOLDER/runs"
model = { type = "new", alphabet = "0123456789+= ", hidden = 16, layers = 1, heads = 2, kv_heads = 1, context = 64 }
objective = { type = "dapo" }
buffer = { groups_per_step = 2, samples_per_group = 2, prompt_tokens = 16 }
generator = { sampling = { max_tokens = 4 } }
learner = { lr = 1e-3, token_budget = 64 }

[[tasks]]
type = "jsonl"
path = "FOLDER/rows.jsonl"
chat = false
held_out = 4
score = { type = "python", function = "broken_scorer:score" }
"""


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    rows = (f'{{"prompt": "{i}+1=", "answer": "2"}}\n' for i in range(100, 140))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "trial.toml").write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    return tmp_path / "trial.toml"


def configured(trial: Path, *overrides: str) -> Config:
    config = load_config(trial, list(overrides))
    if not (config.run_dir / "model").exists():
        create_model(config.model, config.run_dir / "model", 0)  # type: ignore[arg-type]
    return config


def test_prompts_that_are_all_too_long_to_keep_end_the_run(trial: Path) -> None:
    intake = Intake(configured(trial, "buffer.prompt_tokens=3", "buffer.long_prompts=skip"))
    with pytest.raises(ConfigError, match=r"none is left to train on.*rows\.jsonl:\d+: the prompt has \d tokens"):
        intake.train(0, min_version=0)


def test_an_evaluation_of_which_every_prompt_is_skipped_is_refused(trial: Path) -> None:
    config = configured(trial, "buffer.prompt_tokens=3", "buffer.long_prompts=skip", "eval.prompts=4")
    with pytest.raises(ConfigError, match=r"eval\.prompts = 4: every held-out prompt was skipped"):
        Intake(config)


@pytest.mark.parametrize(
    "override", ["seed=1", "tasks.0.held_out=5", "tasks.0.prompt='{prompt} '", "model.alphabet='0123456789+=? '"]
)
def test_a_run_is_not_continued_as_another_one(trial: Path, override: str) -> None:
    RunState(configured(trial)).close()
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        RunState(configured(trial, override), resume=True)
    RunState(configured(trial), resume=True).close()  # nothing was lost, and the log is free


def test_a_run_goes_on_with_what_may_change_and_its_log_says_so(trial: Path) -> None:
    RunState(configured(trial)).close()
    RunState(configured(trial, "steps=5", "tasks.0.score.function='other:one'"), resume=True).close()
    with Log.open(trial.parent / "runs" / "trial" / "rollouts.db") as log:
        assert log.meta.config["steps"] == 5
        assert log.meta.config["tasks"][0]["score"]["function"] == "other:one"


def test_one_hopeless_prompt_is_not_taken_for_a_broken_reward() -> None:
    watch = RewardWatch(samples_per_group=4, attempts=2)
    for _ in range(5):
        for sample in range(8):
            watch.saw(Grade(0, sample // 2, sample % 2, "timeout", detail="no score"))
        watch.check()
        watch.saw(Grade(1, 0, 0, "graded"))
    for sample in range(24):
        watch.check()
        watch.saw(Grade(2, sample, 0, "crash", detail="KeyError: 'x'"))
    with pytest.raises(RewardsBroken, match=r"24 attempts in a row failed.*group 2 sample 23: crash: KeyError: 'x'"):
        watch.check()


def test_a_reward_that_raises_on_everything_ends_the_run_with_its_own_error(trial: Path) -> None:
    (trial.parent / "broken_scorer.py").write_text("def score(text, row):\n    return row['no such key']\n")
    path = os.pathsep.join([str(ROOT), str(trial.parent)])
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "launch", "--no-view", str(trial)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "the reward cannot grade" in done.stderr
    assert "KeyError: 'no such key'" in done.stderr
    with Log.open(trial.parent / "runs" / "trial" / "rollouts.db") as log:
        assert log.query("SELECT count(*) FROM grades WHERE verdict = 'crash'")[0][0] >= 12
