"""The critic: values before each token, a folder that transformers loads, and strangers refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learner_cases import GROUPS, KINDS, make_batch, padded_values, same_bits, tiny_model, weights_of
from transformers import AutoModelForTokenClassification

from engine.checkpoint import (
    CheckpointError,
    Part,
    critic_part,
    load_checkpoint,
    load_critic_checkpoint,
    save_checkpoint,
    save_critic,
)
from engine.config import ConfigError, NewModel
from engine.critic import load_critic, token_values
from engine.gathered import held
from engine.models import create_model, load_model, named_weights
from engine.packing import pack

NEW = NewModel(alphabet="01+=", hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, context=64)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    create_model(NEW, tmp_path / "policy", 1)
    return tmp_path / "policy"


def with_head(critic):
    torch.manual_seed(2)
    with torch.no_grad():
        critic.score.weight.normal_()
        critic.score.bias.fill_(0.25)
    return critic


@pytest.fixture
def critic(policy: Path, tmp_path: Path) -> Path:
    """A critic's folder, with a head that is not zero."""
    made = with_head(load_critic(None, policy, dtype="float32", device="cpu"))
    save_critic(tmp_path / "critic", made, policy, lambda folder: None)
    return tmp_path / "critic"


def values_of(critic, *, token_budget: int) -> torch.Tensor:
    batch = make_batch(GROUPS)
    values = torch.zeros(len(batch.tokens))
    with torch.no_grad():
        for micro_batch in pack(batch, token_budget=token_budget, device="cpu"):
            values[micro_batch.tokens] = token_values(critic, micro_batch)
    return values


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_read_before_each_token_in_any_family(kind: str, tmp_path: Path) -> None:
    tiny_model(kind).save_pretrained(tmp_path)
    critic = load_critic(None, tmp_path, dtype="float32", device="cpu")
    assert not values_of(critic, token_budget=30).any()  # a head of zeros
    with_head(critic)
    expected = padded_values(critic, make_batch(GROUPS)).detach()
    for token_budget in (8, 10_000):
        torch.testing.assert_close(values_of(critic, token_budget=token_budget), expected, atol=1e-5, rtol=1e-5)


def test_values_are_fp32_of_a_bfloat16_critic(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    exact, rough = (with_head(load_critic(None, tmp_path, dtype=d, device="cpu")) for d in ("float32", "bfloat16"))
    (micro_batch,) = pack(make_batch([(2, [3])]), token_budget=9, device="cpu")
    assert token_values(rough, micro_batch).dtype == torch.float32
    torch.testing.assert_close(token_values(rough, micro_batch), token_values(exact, micro_batch), atol=0.3, rtol=0.05)


def test_a_critics_folder_loads_in_transformers_and_as_a_critic(critic: Path, policy: Path) -> None:
    ours = load_critic(critic, policy, dtype="float32", device="cpu")
    model, report = AutoModelForTokenClassification.from_pretrained(critic, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == "LlamaForTokenClassification"
    assert (model.config.num_labels, model.config.id2label) == (1, {0: "value"})
    assert same_bits(weights_of(model), weights_of(ours))
    assert ours.score.bias.item() == 0.25
    backbone = {name: weight for name, weight in weights_of(ours).items() if name.startswith("model.")}
    assert same_bits(backbone, weights_of(load_model(policy, dtype="float32", device="cpu")))


def test_a_critic_is_not_overwritten(critic: Path, policy: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        save_critic(critic, load_critic(None, policy, dtype="float32", device="cpu"), policy, lambda folder: None)


def test_a_critic_that_is_not_one_of_this_policy_is_refused_with_both_sides(
    critic: Path, policy: Path, tmp_path: Path
) -> None:
    def refused(path: Path, of: Path, *says: str) -> None:
        with pytest.raises(ConfigError) as error:
            load_critic(path, of, dtype="float32", device="cpu")
        assert "\n" not in str(error.value)
        assert all(text in str(error.value) for text in (str(path), *says)), str(error.value)

    refused(tmp_path / "gone", policy, "no config.json there")
    refused(policy, policy, "is a LlamaForCausalLM of 2 labels, expected a token classification model")
    create_model(NewModel(**{n: getattr(NEW, n) for n in NEW.__struct_fields__} | {"layers": 3}), tmp_path / "deep", 1)
    refused(critic, tmp_path / "deep", "num_hidden_layers = 2", str(tmp_path / "deep"), "has 3")
    for name, alphabet, says in (
        ("more", "01+=-", ("vocab_size = 6", "has 7")),
        ("other", "10+=", ("different tokenizers",)),
    ):
        create_model(
            NewModel(**{n: getattr(NEW, n) for n in NEW.__struct_fields__} | {"alphabet": alphabet}), tmp_path / name, 1
        )
        refused(critic, tmp_path / name, str(tmp_path / name), *says)
    (critic / "model.safetensors").write_bytes(b"no")
    refused(critic, policy, "cannot be read as a critic")


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(critic: Path, policy: Path, tmp_path: Path) -> Path:
    model = load_critic(critic, policy, dtype="float32", device="cpu")
    part = critic_part(model, held(named_weights(model)), held({"step": torch.tensor(3.0)}), critic)
    return save_checkpoint(tmp_path / "c", 5, policy_part(policy), meta={}, critic=part)


def policy_part(folder: Path) -> Part:
    return Part(held(named_weights(load_model(folder, dtype="float32", device="cpu"))), held({}), folder)


def test_a_checkpoints_critic_comes_back_and_is_a_critic_folder(checkpoint: Path, critic: Path, policy: Path) -> None:
    expected = named_weights(load_critic(critic, policy, dtype="float32", device="cpu"))
    weights, optimizer = load_critic_checkpoint(checkpoint, like=expected)
    assert same_bits(weights, {name: weight.detach() for name, weight in expected.items()})
    assert same_bits(optimizer, {"step": torch.tensor(3.0)})
    assert same_bits(weights_of(load_critic(checkpoint / "critic", policy, dtype="float32", device="cpu")), weights)
    assert same_bits(weights_of(AutoModelForTokenClassification.from_pretrained(checkpoint / "critic")), weights)
    assert load_checkpoint(checkpoint)[2]["step"] == 5


@pytest.mark.parametrize("name", ["critic/model.safetensors", "critic/optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_a_damaged_critic_is_named(name: str, damage: str, checkpoint: Path) -> None:
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"step-000005: {name} is damaged"):
        load_critic_checkpoint(checkpoint)


def test_a_checkpoint_without_a_critic_says_so(policy: Path, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", 5, policy_part(policy), meta={})
    with pytest.raises(CheckpointError, match="it has no critic"):
        load_critic_checkpoint(path)
    assert "critic" not in json.dumps(sorted(json.loads((path / "headrace.json").read_text())["files"]))
