"""`headrace check`: every contradiction is named with its values, and the effective run adds up."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import Config, ConfigError, NewModel, dump_config, load_config, parse_config
from engine.models import create_model, hidden_states, load_model
from engine.packed_attention import PackedAttention
from workers.check import check, notes, problems, refuse
from workers.effective import effective
from workers.memory import activation_bytes, memory
from workers.model_shape import model_shape

ROOT = Path(__file__).parent.parent
TASK = {"type": "reasoning-gym", "dataset": "spell_backward", "chat": False, "extract": "whole", "held_out": 50}
JSONL = {"type": "jsonl", "path": "rows.jsonl", "chat": False, "held_out": 50}
BASE: dict[str, Any] = {
    "name": "trial",
    "steps": 100,
    "model": {"type": "new", "alphabet": "abc", "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "context": 96},
    "tasks": [TASK],
    "objective": {"type": "dapo"},
    "buffer": {"groups_per_step": 32, "samples_per_group": 8, "prompt_tokens": 32},
    "generator": {"sampling": {"max_tokens": 64}, "engine": {"type": "torch", "slots": 64}},
    "learner": {"lr": 1e-3, "updates_per_step": 4, "token_budget": 1024},
    "eval": {"prompts": 20, "every": 10},
}


def config(changes: dict[str, Any] | None = None) -> Config:
    """BASE with dotted keys set, or removed where the value is None."""
    data = copy.deepcopy(BASE)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section, value = data, copy.deepcopy(value)
        for part in path:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(last)
        else:
            section[last] = value
    return parse_config(data, "trial.toml")


@pytest.mark.parametrize(
    ("engine", "error"),
    [
        (
            {"address": "http://h:1"},
            "generator.count = 2, but the server at generator.engine.address = http://h:1 serves one",
        ),
        ({"address": "h:1"}, "generator.engine.address: got 'h:1', expected http://HOST:PORT"),
        ({"address": "http://h:1", "python": "p"}, "got address, and python or options for a server that is started"),
        ({"stream_interval": 0}, "generator.engine.stream_interval: got 0, expected at least 1"),
        ({"deadline_s": 0.0}, "generator.engine.deadline_s: got 0.0, expected a positive number"),
    ],
)
def test_what_an_sglang_engine_cannot_be(engine: dict[str, Any], error: str) -> None:
    found = problems(config({"generator.engine": {"type": "sglang"} | engine, "generator.count": 2}))
    assert any(error in each for each in found), found


def test_the_base_has_neither_errors_nor_notes() -> None:
    assert problems(config()) == []
    assert notes(config()) == []
    refuse(config())


PPO: dict[str, Any] = {"objective": {"type": "vcppo"}, "critic": {"lr": 1e-3}}
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps: got 0, expected at least 1"),
    ({"name": "a/b"}, "name: got 'a/b', expected one folder name"),
    ({"name": ".."}, "name: got '..'"),
    ({"learner.warmup_steps": 9, "learner.decay_steps": 9}, "learner.decay_steps: got 9, expected at least 10"),
    ({"buffer.max_lag": -1}, "buffer.max_lag: got -1, expected at least 0"),
    ({"buffer.max_oversample": float("nan")}, "buffer.max_oversample: got nan, expected at least 1"),
    ({"learner.lr": 0.0}, "learner.lr: got 0.0, expected a positive number"),
    ({"learner.grad_clip": float("inf")}, "learner.grad_clip: got inf, expected a positive number"),
    ({"learner.betas": [0.9, 1.0]}, "learner.betas: got [0.9, 1.0]"),
    ({"learner.device": "gpu"}, "learner.device: got 'gpu'"),
    ({"eval.top_p": 1.5}, "eval.top_p: got 1.5, expected at most 1"),
    ({"generator.engine.slots": 0}, "generator.engine.slots: got 0, expected at least 1"),
    ({"model.heads": 5}, "model.hidden = 64 is not an even multiple of model.heads = 5"),
    ({"model.heads": 0}, "model.heads: got 0, expected at least 1"),
    ({"model.kv_heads": 3}, "model.heads = 4 is not a multiple of model.kv_heads = 3"),
    ({"model.alphabet": "aba"}, "model.alphabet: got 'aba'"),
    ({"tasks": []}, "tasks: got none"),
    ({"tasks": [TASK | {"weight": 0.0}]}, "task spell_backward: weight: got 0.0"),
    ({"tasks": [TASK | {"size": 50}]}, "held_out = 50 leaves nothing of size = 50"),
    ({"tasks": [TASK | {"chat": True}]}, 'chat = true, but model.type = "new" has no chat template'),
    ({"tasks": [TASK | {"system": "Be brief."}]}, "chat = false, but system needs the chat template"),
    ({"tasks": [JSONL | {"messages": "prompt"}]}, "chat = false, but messages needs the chat template"),
    ({"tasks": [TASK | {"score": {"type": "python", "function": "mine"}}]}, "score.function: got 'mine'"),
    ({"eval.prompts": 51}, "eval.prompts = 51 exceeds the 50 held-out prompts"),
    ({"learner.updates_per_step": 33}, "learner.updates_per_step = 33 exceeds buffer.groups_per_step = 32"),
    (
        {"buffer.lease_s": 2.0, "buffer.heartbeat_s": 2.0},
        "buffer.lease_s = 2.0 does not outlive buffer.heartbeat_s = 2.0",
    ),
    ({"buffer.address": "ipc:///tmp/x"}, "buffer.address: got 'ipc:///tmp/x'"),
    ({"learner.token_budget": 32}, "learner.token_budget = 32 cannot hold buffer.prompt_tokens = 32 and one"),
    (
        {"generator.sampling.max_tokens": 65},
        "buffer.prompt_tokens = 32 + generator.sampling.max_tokens = 65 exceed the model's context of 96 tokens",
    ),
    ({"generator": None}, 'objective.type = "dapo" needs samples, and there is no [generator]'),
    ({"buffer.samples_per_group": 1}, "samples_per_group = 1 with buffer.dynamic_sampling = true"),
    (
        {"buffer.samples_per_group": 1, "buffer.dynamic_sampling": False},
        "samples_per_group = 1 with objective.normalize_std = true",
    ),
    ({"objective.clip_low": 1.0}, "objective.clip_low: got 1.0, expected a number in (0, 1)"),
    ({"objective.clip_high": 0.0}, "objective.clip_high: got 0.0, expected a number in (0, 1)"),
    ({"objective.dual_clip": 1.0}, "objective.dual_clip: got 1.0, expected more than 1"),
    ({"objective.correction": {"type": "truncated", "cap": 0.0}}, "objective.correction.cap: got 0.0"),
    ({"objective.correction": {"type": "icepop", "low": 1.5}}, "got low = 1.5 and high = 5.0"),
    ({"reward": {"right": 0.0, "wrong": 0.0}}, "reward.right = 0.0 is not more than reward.wrong = 0.0"),
    ({"reward.overlong": {"max_length": 60, "cache": 60}}, "overlong.cache = 60 is not between 0 and"),
    (
        {"reward.overlong": {"max_length": 65, "cache": 16}},
        "reward.overlong.max_length = 65 exceeds generator.sampling.max_tokens = 64",
    ),
    (
        {"objective": {"type": "sft"}, "tasks": [JSONL]},
        'objective.type = "sft" trains on solutions, and task rows has no `solution`',
    ),
    ({"objective": {"type": "vcppo"}}, 'objective.type = "vcppo" trains a critic, and there is no [critic]'),
    ({"critic": {"lr": 1e-3}}, '[critic] is there, but objective.type = "dapo" has no critic'),
    ({**PPO, "objective": {"type": "ppo", "gamma": 0.0}}, "objective.gamma: got 0.0, expected a number in (0, 1]"),
    ({**PPO, "objective": {"type": "ppo", "lam_critic": 1.1}}, "objective.lam_critic: got 1.1"),
    ({**PPO, "objective": {"type": "ppo", "lam_actor": -0.1}}, "objective.lam_actor: got -0.1"),
    ({**PPO, "objective": {"type": "vapo", "lam_actor": {"alpha": 0.0}}}, "objective.lam_actor.alpha: got 0.0"),
    ({**PPO, "objective": {"type": "vapo", "positive_nll": -1.0}}, "objective.positive_nll: got -1.0"),
    ({**PPO, "objective.clip_low": 1.0}, "objective.clip_low: got 1.0, expected a number in (0, 1)"),
    ({**PPO, "buffer.samples_per_group": 1}, "samples_per_group = 1 with buffer.dynamic_sampling = true"),
    ({**PPO, "generator": None}, 'objective.type = "vcppo" needs samples, and there is no [generator]'),
    ({**PPO, "critic.lr": 0.0}, "critic.lr: got 0.0, expected a positive number"),
    ({**PPO, "critic.value_clip": 0.0}, "critic.value_clip: got 0.0, expected a positive number"),
    ({**PPO, "critic.betas": [0.9, 1.0]}, "critic.betas: got [0.9, 1.0]"),
    ({**PPO, "critic.pretrain_steps": 101}, "critic.pretrain_steps = 101 exceeds steps = 100"),
    (
        {**PPO, "critic.pretrain_steps": 9, "critic.level_off": {"window": 5}},
        "critic.level_off.window = 5 needs 10 steps to compare two windows, more than critic.pretrain_steps = 9",
    ),
    ({**PPO, "critic.level_off": {}}, "critic.level_off is set, but critic.pretrain_steps = 0"),
    ({**PPO, "critic.pretrain_steps": 50, "critic.level_off": {"window": 0}}, "critic.level_off.window: got 0"),
]


@pytest.mark.parametrize(
    ("changes", "said"), CONTRADICTIONS, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_a_contradiction_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    made = config(changes)
    found = problems(made)
    assert len(found) == 1, found
    assert said in found[0]
    with pytest.raises(ConfigError) as refused:
        refuse(made)
    assert str(refused.value) == f"trial.toml: {found[0]}"


NOTES: list[tuple[dict[str, Any], str]] = [
    ({"learner.warmup_steps": 101}, "learner.warmup_steps = 101 exceeds steps = 100"),
    ({"learner.decay_steps": 90}, "learner.decay_steps = 90 is less than steps = 100: lr is 0 in the steps after it"),
    ({"learner.checkpoint_every": 101}, "learner.checkpoint_every = 101 exceeds steps = 100"),
    ({"eval.every": 101}, "eval.every = 101 exceeds steps = 100"),
    ({"learner.updates_per_step": 5}, "groups_per_step = 32 is not a multiple of learner.updates_per_step = 5"),
    ({"learner.ranks": 9}, "learner.ranks = 9 x learner.updates_per_step = 4 exceeds buffer.groups_per_step = 32"),
    ({"learner.token_budget": 94}, "the longest sequence, 95 tokens, exceeds learner.token_budget = 94"),
    ({"generator.sampling.top_p": 0.7}, "top_p = 0.7 and top_k = 0 sample from less"),
    ({"objective.correction": {"type": "none"}}, 'correction.type = "none" with buffer.max_lag = 1'),
    (
        {"objective.overlong_filter": True, "reward.overlong": {"max_length": 64, "cache": 16}},
        "objective.overlong_filter and [reward.overlong] are both on",
    ),
    ({"generator.dtype": "bfloat16"}, "generator.dtype = bfloat16 and learner.dtype = float32"),
    ({"buffer.lease_s": 5.0}, "buffer.lease_s = 5.0 is less than 3 x buffer.heartbeat_s = 2.0"),
    ({"generator.count": 0}, "generator.count = 0: the run waits until a generator"),
    ({"reward.count": 0}, "reward.count = 0: the run waits until a reward"),
    ({"generator.engine.slots": 4}, "generator.engine.slots = 4 is less than buffer.samples_per_group = 8"),
    ({"generator.engine.slots": 1537}, "1 x 1537 generator slots exceed the 1536 samples"),
    (
        {"objective": {"type": "sft"}},
        'objective.type = "sft" samples nothing: buffer.samples_per_group (a row has one solution), [generator], [eval] has',
    ),
    ({**PPO, "generator.dtype": "bfloat16"}, "generator.dtype = bfloat16 and learner.dtype = float32"),
    (PPO, "buffer.dynamic_sampling = true: the critic learns from groups with right and wrong answers only"),
    ({"objective": {"type": "collect"}}, "buffer.dynamic_sampling = true: the critic learns from"),
    ({**PPO, "critic.path": "nowhere/critic"}, "critic.path: nowhere/critic: no config.json there; `headrace pretrain"),
]


@pytest.mark.parametrize(("changes", "said"), NOTES, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_a_note_does_not_refuse(changes: dict[str, Any], said: str) -> None:
    made = config(changes)
    if "critic.path" not in changes:  # what is missing on this machine is a note in a check, and refused by the run
        refuse(made)
    assert any(said in note for note in notes(made)), notes(made)


def test_all_contradictions_are_told_at_once() -> None:
    made = config({"learner.updates_per_step": 33, "learner.token_budget": 32, "objective.dual_clip": 0.5})
    with pytest.raises(ConfigError) as refused:
        refuse(made)
    assert str(refused.value).count("trial.toml: ") == 3


def first_run(folder: Path, changes: dict[str, Any] | None = None) -> str:
    """The TOML of a cold start."""
    model = BASE["model"] | (changes or {})
    lines = [
        'name = "first"\nsteps = 10\n[model]', *(f"{key} = {json.dumps(value)}" for key, value in model.items()),
        '[[tasks]]\ntype = "reasoning-gym"\ndataset = "spell_backward"\nchat = false\n[objective]\ntype = "sft"',
        "[buffer]\ngroups_per_step = 8\nprompt_tokens = 32\n[learner]\nlr = 0.001",
    ]  # fmt: skip
    file = folder / "first.toml"
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def test_a_cold_start_fits_its_run(tmp_path: Path) -> None:
    path = first_run(tmp_path)
    assert problems(config({"cold_start": path})) == []
    assert "have the same folder, runs/first" in problems(config({"cold_start": path, "name": "first"}))[0]
    other = first_run(tmp_path, {"layers": 3})
    (said,) = problems(config({"cold_start": other}))
    assert "layers=2" in said
    assert "layers=3" in said
    assert "cannot be read" in problems(config({"cold_start": str(tmp_path / "none.toml")}))[0]
    file = Path(path)
    file.write_text(f"cold_start = {json.dumps(path)}\n{file.read_text(encoding='utf-8')}", encoding="utf-8")
    assert any("leads back to itself" in problem for problem in problems(config({"cold_start": path})))


def test_a_missing_model_is_a_note_here_and_refused_by_the_run(tmp_path: Path) -> None:
    made = config({"model": {"type": "path", "path": str(tmp_path / "gone")}})
    assert problems(made) == []
    assert "no config.json there" in notes(made)[-1]
    assert [section.title for section in effective(made)][-1] == "The whole run"
    with pytest.raises(ConfigError, match=r"no config\.json there; expected a Hugging Face model folder"):
        refuse(made)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="num_attention_heads"):
        refuse(made)


SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_exactly(tmp_path: Path, family: str, tied: bool) -> None:
    settings = AutoConfig.for_model(family, **SIZES, num_key_value_heads=2, tie_word_embeddings=tied, head_dim=16)
    settings.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    shape = model_shape(config({"model": {"type": "path", "path": str(tmp_path)}}))
    assert shape.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(tmp_path: Path, dtype: str) -> None:
    model = NewModel(alphabet="abc", hidden=96, layers=3, heads=6, kv_heads=2, intermediate=256, context=512)
    create_model(model, tmp_path / "model", 0)
    policy = load_model(tmp_path / "model", dtype=dtype, device="cpu")
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention = PackedAttention(np.array([[0, 400, 0, 0]]), "cpu")
        hidden_states(policy, torch.zeros(400, dtype=torch.long), torch.arange(400), attention)
    measured = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
    shape = model_shape(config({"model": {"type": "path", "path": str(tmp_path / "model")}}))
    assert activation_bytes(shape, 400, dtype) == pytest.approx(measured, rel=0.15)


def dapo_32b(folder: Path) -> Config:
    """The paper's run, on the published shape of Qwen2.5-32B."""
    shape = {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "intermediate_size": 27648, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return config(
        {
            "model": {"type": "path", "path": str(folder)},
            "buffer": {"groups_per_step": 512, "samples_per_group": 16},
            "generator": {"sampling": {"max_tokens": 20480}, "count": 8, "dtype": "bfloat16"},
            "reward": {"overlong": {"max_length": 20480, "cache": 4096}},
            "learner": {
                "lr": 1e-6,
                "updates_per_step": 16,
                "warmup_steps": 20,
                "token_budget": 22528,
                "dtype": "bfloat16",
            },
        }
    )


def test_the_effective_run_in_one_unit_system(tmp_path: Path) -> None:
    made = dapo_32b(tmp_path)
    lines = {(s.title, name): value for s in effective(made) for name, value in s.lines}
    assert "32,763,876,352 parameters" in lines["Run", "model"]
    assert lines["A step", "samples"] == "512 x 16 = 8,192"
    assert "at most 167,772,160 of responses (8,192 x 20,480) and 1,048,576 of prompts" in lines["A step", "tokens"]
    assert lines["A step", "updates"] == "16, each of 32 groups = 512 samples"
    assert "at most 1,024 groups that will be trained = 16,384 samples" in lines["Pace", "in the system"]
    assert "3 x = 3,072 groups = 49,152 samples" in lines["Pace", "dynamic sampling"]
    assert lines["The whole run", "steps"] == "100 = 1,600 updates = 100 versions"
    assert "warm-up over 20 steps = 320 updates" in lines["The whole run", "learning rate"]
    assert (
        "11, each 20 prompts x 1 = 20 samples, after step 0, 10, 20, 30, ..., 100"
        in lines["The whole run", "evaluations"]
    )
    roles = {role.name: role for role in memory(made, model_shape(made))}
    assert roles["learner"].parts["weights"] == 2 * 32_763_876_352
    assert roles["learner"].parts["optimizer"] == 8 * 32_763_876_352
    assert roles["generator"].parts["keys and values"] == 2 * 64 * 2 * 8 * 128 * (64 * 20480 + 4 * 2048)
    assert any("this machine has" in note for note in notes(made)) or torch.cuda.is_available()


def test_check_prints_and_says_by_its_code(tmp_path: Path) -> None:
    screen = io.StringIO()
    assert check(config(), Console(file=screen, width=200)) == 0
    assert "trial.toml: can run" in screen.getvalue()
    assert "32 x 8 = 256" in screen.getvalue()
    assert check(config({"learner.updates_per_step": 33}), Console(file=screen, width=200)) == 2
    assert "error: learner.updates_per_step = 33 exceeds" in screen.getvalue()
    assert "trial.toml: 1 contradiction" in screen.getvalue()
    assert check(config({"objective": {"type": "sft"}}), Console(file=screen, width=200)) == 0
    assert "at most 64 groups that will be trained = 64 samples" in screen.getvalue()
    assert check(config({"buffer.max_lag": 0}), Console(file=screen, width=200)) == 0
    assert "sampling and training take turns" in screen.getvalue()


def test_a_critic_in_the_effective_run(tmp_path: Path) -> None:
    dapo, changes = dapo_32b(tmp_path), {"objective": {"type": "vapo"}, "critic": {"lr": 2e-6, "pretrain_steps": 50}}
    made = parse_config(dump_config(dapo) | changes, "vapo")
    lines = {(s.title, name): value for s in effective(made) for name, value in s.lines}
    assert lines["Run", "objective"] == (
        "vapo: clip -0.2 / +0.28, GAE with gamma 1, lambda 1 - 1 / (0.05 x length) (actor) and 1 (critic), 0.1 x NLL of "
        "right answers, mean over tokens, correction truncated"
    )
    assert (
        "from the policy, with a head of zeros, learning rate 2e-06, alone in the first 50 steps"
        in lines["Run", "critic"]
    )
    with_critic, without = (memory(c, model_shape(c))[1].parts for c in (made, dapo))
    head = 5120 + 1 - 152064 * 5120  # in place of the output layer
    assert with_critic["critic"] == 12 * (32_763_876_352 + head)
    assert with_critic == without | {"critic": with_critic["critic"]}
    collects = parse_config(dump_config(dapo) | {"objective": {"type": "collect"}}, "collect")
    assert "optimizer" not in memory(collects, model_shape(collects))[1].parts


def test_a_critic_of_another_size_is_refused(tmp_path: Path) -> None:
    shape = {"model_type": "llama", "vocab_size": 5, "hidden_size": 32, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    with pytest.raises(ConfigError, match="has hidden_size = 32, the policy has 64; expected the same"):
        refuse(config({**PPO, "critic.path": str(tmp_path)}))


def test_the_buffer_can_refuse_without_torch() -> None:
    code = "import sys, workers.check; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_the_configs_that_ship_have_no_contradictions(path: Path) -> None:
    with contextlib.chdir(ROOT):
        assert problems(load_config(path)) == []
