"""configs/vcppo-qwen2.5-32b.toml and configs/vapo-qwen2.5-32b.toml are the papers' runs, and the small ones run in a chain: the
numbers here were typed from the papers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import (
    CollectObjective,
    Config,
    LengthAdaptive,
    NoCorrection,
    PathModel,
    PythonScore,
    VapoObjective,
    VcppoObjective,
    load_config,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PAPERS = ("vcppo-qwen2.5-32b", "vapo-qwen2.5-32b")


@pytest.fixture(scope="module")
def vcppo() -> Config:
    return load_config(CONFIGS / "vcppo-qwen2.5-32b.toml")


@pytest.fixture(scope="module")
def vapo() -> Config:
    return load_config(CONFIGS / "vapo-qwen2.5-32b.toml")


def test_vcppos_objective(vcppo: Config) -> None:
    """Algorithm 1: symmetric clip, lambda 0.95 for the policy, 1 for the critic, gamma 1; no KL (there is no such setting)."""
    assert vcppo.objective == VcppoObjective(
        clip_low=0.2, clip_high=0.2, dual_clip=None, loss="sequence", overlong_filter=False, gamma=1.0, lam_actor=0.95,
        lam_critic=1.0, whiten=False, positive_nll=0.0, correction=NoCorrection(),
    )  # fmt: skip
    assert not any("kl" in name.split("_") for name in VcppoObjective.__struct_fields__)


def test_vapos_objective(vapo: Config) -> None:
    """Equations 5 and 7 to 9: alpha 0.05, clip 0.2 / 0.28, one mean over tokens, mu 0.1."""
    assert vapo.objective == VapoObjective(
        clip_low=0.2, clip_high=0.28, dual_clip=None, loss="token", overlong_filter=False, gamma=1.0,
        lam_actor=LengthAdaptive(alpha=0.05), lam_critic=1.0, whiten=False, positive_nll=0.1, correction=NoCorrection(),
    )  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_both_optimizers(name: str) -> None:
    """The policy at 1e-6, the critic at 2e-6, no clip of values (algorithm 1)."""
    config = load_config(CONFIGS / f"{name}.toml")
    assert config.critic is not None
    assert (config.learner.lr, config.critic.lr) == (1e-6, 2e-6)
    assert config.critic.value_clip is None
    assert (config.learner.grad_clip, config.critic.grad_clip) == (1.0, 1.0)
    assert config.learner.updates_per_step == 16
    responses = config.buffer.groups_per_step * config.buffer.samples_per_group
    assert responses == 8192
    assert responses / config.learner.updates_per_step == 512
    assert not config.buffer.dynamic_sampling
    assert config.buffer.max_lag == 0


def test_value_pretraining(vcppo: Config, vapo: Config) -> None:
    """VC-PPO's critic comes from its own pretraining; VAPO's has 50 steps to itself."""
    assert vcppo.critic is not None
    assert vapo.critic is not None
    assert vcppo.critic.path is not None
    assert vcppo.critic.pretrain_steps == 0
    assert (vapo.critic.path, vapo.critic.pretrain_steps, vapo.critic.level_off) == (None, 50, None)
    assert (vapo.steps - 50) * vapo.learner.updates_per_step == pytest.approx(5000, abs=16)


def test_batches_and_lengths(vcppo: Config, vapo: Config) -> None:
    """VC-PPO 8192 prompts x 1 within a context of 16K; VAPO 512 x 16."""
    assert (vcppo.buffer.groups_per_step, vcppo.buffer.samples_per_group) == (8192, 1)
    assert (vapo.buffer.groups_per_step, vapo.buffer.samples_per_group) == (512, 16)
    assert vcppo.generator is not None
    assert vcppo.buffer.prompt_tokens + vcppo.generator.sampling.max_tokens == 16384


@pytest.mark.parametrize("name", PAPERS)
def test_model_reward_and_evaluation(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.toml")
    assert isinstance(config.model, PathModel)
    assert "Qwen2.5-32B" in config.model.path
    assert config.tasks[0].score == PythonScore("engine.answers:dapo")
    assert (config.reward.right, config.reward.wrong, config.reward.overlong) == (1.0, -1.0, None)
    assert (config.eval.prompts, config.eval.samples, config.eval.temperature, config.eval.top_p) == (30, 32, 1.0, 0.7)


@pytest.mark.parametrize("name", PAPERS)
def test_every_value_names_its_source(name: str) -> None:
    lines = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    settings = [line for line in lines if re.match(r"\w+ = ", line) and not line.startswith(("name", "type"))]
    assert len(settings) > 45
    for line in settings:
        assert re.search(r"\[(paper [\w., ]+|vapo|dapo|open|ours)\]", line.partition("#")[2]), line
    assert sum("[open]" in line for line in settings) >= 6  # what the papers leave open is marked so


def test_the_small_configs_are_a_chain() -> None:
    collect, trained = (load_config(CONFIGS / f"{name}.toml") for name in ("vcppo-collect", "quickstart-vcppo"))
    quickstart = load_config(CONFIGS / "quickstart.toml")
    assert collect.objective == CollectObjective()
    assert collect.critic is not None
    assert collect.critic.level_off is not None
    assert not collect.buffer.dynamic_sampling
    assert trained.critic is not None
    assert trained.critic.path == f"{collect.runs}/{collect.name}/critic"
    assert isinstance(trained.objective, VcppoObjective)
    assert collect.model == trained.model == quickstart.model
    assert collect.tasks == trained.tasks == quickstart.tasks
    assert collect.cold_start == trained.cold_start == quickstart.cold_start
