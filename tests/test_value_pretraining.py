"""Value pretraining within a run: the policy stays as it is, and when it ends follows from the log's steps alone."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_cases import GROUPS, make_batch, make_config, same_bits, tiny_critic, tiny_model, weights_of
from replayed_run import Maker
from safetensors.torch import load_file
from test_ppo import stale_batch

from engine.checkpoint import CheckpointError
from engine.config import ConfigError, CriticConfig, LevelOff
from engine.critic import load_critic
from engine.learn_torch import TorchLearner
from engine.level_off import Levelling, Pretraining
from protocols.log import Log
from workers.replay import Request, replay
from workers.replay_source import ReplayError

VCPPO: dict[str, Any] = {"objective": {"type": "vcppo"}, "critic": {"lr": 1e-2, "pretrain_steps": 3}}


def levelling(losses: list[float], explained: list[float] | None = None) -> bool:
    rule = Levelling(LevelOff(window=2, loss=0.1, explained_variance=0.05))
    for loss, variance in zip(losses, explained or [0.5] * len(losses), strict=True):
        rule.add(loss, variance)
    return rule.level


def test_both_figures_must_stand_still_over_two_windows() -> None:
    assert not levelling([1.0, 1.0, 1.0])  # too few
    assert levelling([9.0, 1.0, 1.0, 1.0, 1.0])  # only the last two windows count
    assert levelling([1.2, 0.8, 0.91, 0.91])
    assert not levelling([1.0, 1.0, 0.85, 0.9])
    assert not levelling([1.0, 1.0, 1.2, 1.1])
    assert not levelling([1.0] * 4, [0.4, 0.4, 0.46, 0.46])
    assert not levelling([1.0] * 4, [0.4, 0.4, math.nan, 0.4])


def test_a_state_continues_exactly() -> None:
    config = CriticConfig(lr=1.0, pretrain_steps=9, level_off=LevelOff(window=2, loss=0.1, explained_variance=0.1))
    first, second = Pretraining(config), Pretraining(config)
    rows = [(0.9, math.nan), (1 / 3, 0.1), (0.3, 0.2), (0.3, 0.2), (0.3, 0.2), (0.3, 0.2)]
    ends = []
    for loss, explained in rows:
        metrics = {"value_loss": loss, "explained_variance": explained, "updates": 1.0}
        first.add(metrics)
        again = Pretraining(config)
        again.load(json.loads(json.dumps(second.state())))
        again.add(metrics)
        second = again
        ends.append((first.over, second.over))
    assert ends == [(False, False)] * 4 + [(True, True)] * 2
    assert Pretraining(None).over


def test_only_the_critic_is_trained_and_it_learns() -> None:
    batch = stale_batch(1)
    config = make_config(objective={"type": "vcppo"}, critic={"pretrain_steps": 12, "lr": 3e-3}, warmup_steps=2)
    model, critic = tiny_model(), tiny_critic()
    learner = TorchLearner(config, model, critic=critic)
    before = weights_of(model)
    rows = [learner.step(step, [batch]) for step in range(4, 16)]
    assert same_bits(weights_of(model), before)
    assert all(row["pretraining"] == 1 and "loss" not in row for row in rows)
    assert rows[-1]["value_loss"] < 0.5 * rows[0]["value_loss"]
    assert rows[-1]["explained_variance"] > rows[0]["explained_variance"] + 0.3
    assert rows[0]["masked_fraction"] == 0  # no token is too old for the policy that there is
    assert rows[0]["return_mean"] == pytest.approx(float((batch.rewards.repeat(batch.lengths)).mean()), abs=1e-6)
    row = learner.step(16, [make_batch(GROUPS, step=16)])
    assert row["pretraining"] == 0
    assert row["lr"] == pytest.approx(config.learner.lr)  # 16 - 12 steps of the policy are more than its warm-up
    assert not same_bits(weights_of(model), before)


def test_warm_up_of_the_policy_begins_when_it_is_trained() -> None:
    config = make_config(objective={"type": "vcppo"}, critic={"pretrain_steps": 2}, lr=0.4, warmup_steps=4)
    learner = TorchLearner(config, tiny_model(), critic=tiny_critic())
    rates = [learner.step(step, [make_batch(GROUPS, step=step)]).get("lr") for step in (1, 2, 3, 4)]
    assert rates == [None, None, pytest.approx(0.1), pytest.approx(0.2)]


# --- a run -------------------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> list[str]:
    with Log.open(folder / "rollouts.db") as log:
        return [row.weights_hash for row in log.steps()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, of which the first three train the critic alone; a checkpoint amid them, and later ones."""
    made = Maker(tmp_path_factory.mktemp("pretraining") / "trial", **VCPPO, steps=6, learner={"keep_checkpoints": 9})
    for step in range(1, 7):
        made.step(step)
    return made.close()


def test_the_log_has_both_models(run: Path) -> None:
    with Log.open(run / "rollouts.db") as log:
        rows = list(log.steps())
    policies = [{n: v for n, v in row.fingerprints.items() if not n.startswith("critic.")} for row in rows]
    critics = [{n: v for n, v in row.fingerprints.items() if n.startswith("critic.")} for row in rows]
    assert all("critic.score.weight" in critic for critic in critics)
    assert policies[0] == policies[1] == policies[2] != policies[3]
    assert len({str(critic) for critic in critics}) == 6
    assert len({row.weights_hash for row in rows}) == 6
    assert [row.metrics["pretraining"] for row in rows] == [1, 1, 1, 0, 0, 0]
    policy = load_file(run / "checkpoints" / "step-000002" / "model.safetensors")
    assert same_bits(policy, load_file(run / "model" / "model.safetensors"))


@pytest.mark.parametrize("start", [0, 2, 4])
def test_a_replay_from_anywhere_comes_to_the_same_weights(run: Path, start: int) -> None:
    assert replay(Request(run=str(run), start=start), []) == 0


def test_where_level_off_ends_it_a_replay_ends_it_too(tmp_path: Path) -> None:
    critic = {"lr": 1e-4, "pretrain_steps": 6, "level_off": {"window": 1, "loss": 9.0, "explained_variance": 9.0}}
    made = Maker(
        tmp_path / "trial", objective={"type": "vcppo"}, critic=critic, steps=6, learner={"checkpoint_every": 1}
    )
    for step in range(1, 5):
        made.step(step)
    folder = made.close()
    with Log.open(folder / "rollouts.db") as log:
        assert [row.metrics["pretraining"] for row in log.steps()] == [1, 1, 0, 0]
    assert replay(Request(run=str(folder)), []) == 0
    assert replay(Request(run=str(folder), start=3), []) == 0


def test_a_checkpoints_critic_starts_another_run(run: Path, tmp_path: Path) -> None:
    path = run / "checkpoints" / "step-000006" / "critic"
    trained = load_critic(path, run / "model", dtype="float32", device="cpu")
    critic = {"lr": 1e-2, "path": str(path)}
    made = Maker(tmp_path / "next", objective={"type": "vapo"}, critic=critic)
    assert made.trainer.critic is not None
    assert same_bits(weights_of(made.trainer.critic), weights_of(trained))
    made.step(1)
    made.step(2)
    again = load_critic(made.close() / "checkpoints/step-000002/critic", run / "model", dtype="float32", device="cpu")
    assert not same_bits(weights_of(again), weights_of(trained))


def test_a_replay_wants_the_critic_that_the_run_started_from(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "pretrained"
    shutil.copytree(run / "checkpoints" / "step-000006" / "critic", path)
    critic = {"lr": 1e-2, "path": str(path)}
    made = Maker(tmp_path / "next", objective={"type": "vapo"}, critic=critic, learner={"checkpoint_every": 1})
    made.step(1)
    made.step(2)
    folder = made.close()
    assert replay(Request(run=str(folder)), []) == 0
    shutil.rmtree(path)
    shutil.copytree(run / "checkpoints" / "step-000004" / "critic", path)
    with pytest.raises(
        ReplayError, match=r"critic .* is gone: .*pretrained has other weights now. Expected .*pretrained as"
    ):
        replay(Request(run=str(folder)), [])
    assert replay(Request(run=str(folder), start=1), []) == 0, "a checkpoint has its own"
    other = [f'critic.path="{run / "checkpoints" / "step-000006" / "critic"}"']
    assert replay(Request(run=str(folder), overrides=other, out=str(tmp_path / "new")), []) == 0, "it was asked for"
    shutil.rmtree(path)
    with pytest.raises(ReplayError, match="pretrained has no weights"):
        replay(Request(run=str(folder)), [])


def test_a_damaged_or_missing_critic_is_refused_when_a_run_continues(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "trial")
    newest = copy / "checkpoints" / "step-000006"
    made = Maker(tmp_path / "other", **VCPPO)
    made.trainer.checkpoints = copy / "checkpoints"
    assert made.trainer.resume(6) == 6
    assert made.trainer.learner.pretraining.over
    assert torch.equal(
        made.trainer.learner.critic.optimizer.state()["step"],
        load_file(newest / "critic" / "optimizer.safetensors")["step"],
    )
    (newest / "critic" / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"critic/optimizer\.safetensors is damaged: got missing"):
        made.trainer.resume(6)
    document = json.loads((newest / "headrace.json").read_text())
    document["files"] = {name: digest for name, digest in document["files"].items() if "critic" not in name}
    (newest / "headrace.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="step-000006: it has no critic"):
        made.trainer.resume(6)
    made.close()


def test_a_run_without_critic_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no \[critic\]"):
        Maker(tmp_path / "trial", objective={"type": "vcppo"})
