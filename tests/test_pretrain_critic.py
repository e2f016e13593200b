"""`headrace pretrain-critic` and `headrace drift`: a critic learns from a stored log, which nothing touches."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learner_cases import padded_values, same_bits, weights_of
from replayed_run import Maker, contents
from rich.console import Console
from test_ppo import plain_gae
from transformers import AutoModelForTokenClassification

from engine.config import ConfigError
from engine.critic import load_critic
from engine.models import load_model
from protocols.log import Log
from workers.drift import drift
from workers.pretrain import Request, pretrain
from workers.pretrain_data import StoredGroups, is_held_out
from workers.replay_source import StoredRun

ROOT = Path(__file__).parent.parent
STEPS = 8


def collected(folder: Path, **sections: Any) -> Path:
    """A log whose policy was fixed: right answers are those that end well, so a critic has something to learn."""
    made = Maker(
        folder, steps=STEPS, objective={"type": "collect"},
        critic={"lr": 1e-2, "pretrain_steps": 30, "weight_decay": 0.0}, **sections,
    )  # fmt: skip
    for step in range(1, STEPS + 1):
        made.step(step)
    return made.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collected(tmp_path_factory.mktemp("collected") / "trial")


@pytest.fixture(scope="module")
def critic(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("critic") / "critic"
    before = contents(run)
    assert pretrain(Request(run=str(run), out=str(out)), []) == 0
    assert contents(run) == before
    return out


def held_out(run: Path) -> list[int]:
    with StoredRun.open(run) as source:
        return StoredGroups(source).held_out.tolist()


def test_a_collecting_run_trains_nothing_and_can_be_replayed(run: Path) -> None:
    with Log.open(run / "rollouts.db") as log:
        rows = list(log.steps())
    assert len({row.weights_hash for row in rows}) == 1
    assert all(row.metrics["updates"] == 0 and row.metrics["accuracy"] > 0 for row in rows)
    weights = (
        weights_of(load_model(run / folder, dtype="float32", device="cpu"))
        for folder in ("model", "checkpoints/step-000008")
    )
    assert same_bits(*weights)


def test_what_is_held_out_is_never_trained_on(run: Path) -> None:
    out = held_out(run)
    assert out
    assert all(is_held_out(group) for group in out)
    with StoredRun.open(run) as source:
        data = StoredGroups(source)
        epochs = [[group for step in data.steps_of(epoch, 3) for group in step] for epoch in range(3)]
        again = [group for step in data.steps_of(2, 3) for group in step]
        logged = [group for (group,) in source.log.query("SELECT group_id FROM plan ORDER BY step, position")]
    assert epochs[0] == [group for group in logged if group not in out]  # as they were logged
    assert sorted(epochs[1]) == sorted(epochs[2]) == sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2] == again


def test_the_critic_learns_and_is_a_folder_of_transformers(run: Path, critic: Path) -> None:
    rows = [json.loads(line) for line in (critic / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 5, 10, 15, 20, 25, 30]
    assert rows[0]["value_loss"] == pytest.approx(0.5)  # a head of zeros, rewards of 1 and -1
    assert min(row["value_loss"] for row in rows) < 0.5
    assert (critic / "curve.png").read_bytes().startswith(b"\x89PNG")
    ours = load_critic(critic, run / "model", dtype="float32", device="cpu")
    assert same_bits(weights_of(AutoModelForTokenClassification.from_pretrained(critic)), weights_of(ours))
    values, returns = [], []
    with Log.open(run / "rollouts.db") as log:
        for group in held_out(run):
            batch = log.batch(1, [group])
            values.append(padded_values(ours, batch).detach().numpy())
            returns.append(np.repeat(batch.rewards, batch.lengths))
    value, target = np.concatenate(values).astype(float), np.concatenate(returns).astype(float)
    assert rows[-1]["value_loss"] == pytest.approx(0.5 * ((value - target) ** 2).mean(), abs=1e-5)
    assert rows[-1]["explained_variance"] == pytest.approx(1 - (target - value).var() / target.var(), abs=1e-5)


def test_two_ranks_come_to_the_same_critic(run: Path, critic: Path, tmp_path: Path) -> None:
    out = tmp_path / "critic"
    command = [
        sys.executable,
        "-m",
        "workers.cli",
        "pretrain-critic",
        str(run),
        "--out",
        str(out),
        "--set",
        "learner.ranks=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "30 steps are made after 30 steps" in done.stdout
    alone, both = (
        [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()] for folder in (critic, out)
    )
    for one, two in zip(alone, both, strict=True):
        assert two["value_loss"] == pytest.approx(one["value_loss"], abs=5e-3)


def test_it_ends_when_it_has_levelled_off(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = "critic.level_off={window = 1, loss = 9.0, explained_variance = 99.0}"
    request = Request(run=str(run), out=str(tmp_path / "c"), overrides=["critic.pretrain_steps=0", rule], every=2)
    assert pretrain(request, []) == 0
    assert "it has levelled off after 4 steps" in capsys.readouterr().out


def test_settings_may_come_from_another_config(run: Path, tmp_path: Path) -> None:
    text = "\n".join(
        [
            'name = "other"\nsteps = 3\ntasks = []\n[model]\ntype = "path"\npath = "nowhere"\n[objective]\ntype = "vcppo"',
            "[buffer]\ngroups_per_step = 1\n[learner]\nlr = 1.0\ntoken_budget = 64\n[critic]\nlr = 0.001\npretrain_steps = 7",
        ]
    )
    (tmp_path / "other.toml").write_text(text)
    request = Request(run=str(run), config=str(tmp_path / "other.toml"), out=str(tmp_path / "c"))
    assert pretrain(request, []) == 0
    last = json.loads((tmp_path / "c" / "curve.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 7


# --- errors ------------------------------------------------------------------------------------------------------------


def refused(request: Request) -> str:
    with pytest.raises(ConfigError) as error:
        pretrain(request, [])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_runs_and_settings_that_cannot_be_used(run: Path, critic: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert "no such run" in refused(Request(run=str(tmp_path / "none")))
    assert "exists already" in refused(Request(run=str(run), out=str(critic)))
    assert "--every: got 0" in refused(Request(run=str(run), out=str(tmp_path / "x"), every=0))
    assert "critic.lr: got 0" in refused(Request(run=str(run), out=str(tmp_path / "x"), overrides=["critic.lr=0.0"]))
    stranger = Maker(tmp_path / "stranger", model={"hidden": 24}).close()
    assert "no [critic]" in refused(Request(run=str(stranger)))
    assert "no step is planned" in refused(Request(run=str(stranger), overrides=["critic.lr=0.1"]))
    wider = Request(run=str(run), out=str(tmp_path / "x"), overrides=[f'critic.path="{stranger}/model"'])
    assert "expected a token classification model" in refused(wider)
    assert contents(run) == before
    assert not (tmp_path / "x").exists()


def test_groups_without_grades_are_named(tmp_path: Path) -> None:
    made = Maker(tmp_path / "trial", objective={"type": "collect"}, critic={"lr": 0.1})
    groups = [made.group([], missing=2)] + [made.group([True, False]) for _ in range(40)]
    made.log.add_plan(1, groups)
    folder = made.close()
    assert "group 0 has no graded response" in refused(Request(run=str(folder)))


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workers.cli", "pretrain-critic", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("headrace: ")
    assert done.stderr.count("\n") == 1


# --- drift -------------------------------------------------------------------------------------------------------------


def test_drift_is_what_a_plain_computation_says(run: Path, critic: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    (found,) = drift(str(run), [str(critic)], str(tmp_path / "d.png"), Console(file=screen, width=160))
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert "mean value V and mean advantage A" in screen.getvalue()
    model = load_critic(critic, run / "model", dtype="float32", device="cpu")
    value: dict[int, list[float]] = {}
    advantage: dict[int, list[float]] = {}
    with Log.open(run / "rollouts.db") as log:
        for (group,) in log.query("SELECT group_id FROM plan"):
            batch = log.batch(1, [group])
            values, ends = padded_values(model, batch).detach().numpy(), np.cumsum(batch.lengths)
            for end, length, reward in zip(ends, batch.lengths, batch.rewards, strict=True):
                own = values[end - length : end].tolist()
                for at, (v, a) in enumerate(
                    zip(own, plain_gae([0.0] * (length - 1) + [float(reward)], own, 1.0, 0.95), strict=True)
                ):
                    value.setdefault(at, []).append(v)
                    advantage.setdefault(at, []).append(a)
    for at, expected in value.items():
        assert found.count[at] == len(expected)
        assert found.value[at] == pytest.approx(np.mean(expected), abs=1e-5)
        assert found.paired[at] == found.own[at] == pytest.approx(np.mean(advantage[at]), abs=1e-5)


def test_drift_finds_the_critics_of_a_run_or_says_that_it_has_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no critic there"):
        drift(str(run), [], str(tmp_path / "d.png"), Console(file=io.StringIO()))
    made = Maker(
        tmp_path / "ppo", steps=16, objective={"type": "vapo"}, critic={"lr": 1e-2}, learner={"checkpoint_every": 8}
    )
    for step in range(1, 17):
        made.step(step)
    folder = made.close()
    found = drift(str(folder), [], None, Console(file=io.StringIO()))
    assert [Path(one.name).parent.name for one in found] == ["step-000008", "step-000016"]
    assert (folder / "drift.png").exists()
    assert not torch.equal(*(torch.from_numpy(one.own) for one in found))
