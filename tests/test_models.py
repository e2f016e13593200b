"""The models compute what `transformers` computes, whatever their family, and broken folders are named as such."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from engine.config import ConfigError, NewModel
from engine.devices import card_of, collective_backend, exact_device, resolve_device, use_device
from engine.models import create_model, hidden_states, load_model, named_weights, output_weight

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-scaled-rope": LlamaConfig(
        **SIZES,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
}  # fmt: skip


class Causal:
    """The plain context: one sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)


def write(config: PretrainedConfig, folder: Path, *, shard: str = "5GB") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # biases and norms start as 0 and 1, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_logits_are_those_of_transformers(family: str, shard: str, tmp_path: Path) -> None:
    folder = write(FAMILIES[family], tmp_path / "m", shard=shard)
    assert (folder / "model.safetensors").exists() == (shard == "5GB")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    ours = load_model(folder, dtype="float32", device="cpu")
    ids = torch.randint(0, 61, (23,))
    with torch.no_grad():
        expected = theirs(input_ids=ids[None]).logits[0]
        hidden = hidden_states(ours, ids, torch.arange(23), Causal())
    assert hidden.shape == (23, 32)
    torch.testing.assert_close(hidden @ output_weight(ours).T, expected, atol=2e-6, rtol=1e-5)


def test_positions_are_used(tmp_path: Path) -> None:
    model = load_model(write(FAMILIES["qwen2"], tmp_path / "m"), dtype="float32", device="cpu")
    ids = torch.randint(0, 61, (9,))
    with torch.no_grad():
        plain = hidden_states(model, ids, torch.arange(9), Causal())
        moved = hidden_states(model, ids, torch.arange(9) + 5, Causal())
        stretched = hidden_states(model, ids, torch.arange(9) * 3, Causal())
    torch.testing.assert_close(plain, moved, atol=1e-5, rtol=1e-4)  # rotary embeddings are relative
    assert (plain - stretched).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_architecture_without_weights(family: str, dtype: str, tmp_path: Path) -> None:
    folder = write(FAMILIES[family], tmp_path / "m")
    full = load_model(folder, dtype=dtype, device="cpu")
    (folder / "model.safetensors").unlink()
    empty = load_model(folder, dtype=dtype, device="cpu", weights=False)
    assert not empty.training
    assert not full.training
    assert {n: (t.shape, t.dtype) for n, t in named_weights(empty).items()} == {
        n: (t.shape, t.dtype) for n, t in named_weights(full).items()
    }
    assert all(torch.isnan(t).all() for t in named_weights(empty).values())
    for (name, theirs), (_, ours) in zip(full.named_buffers(), empty.named_buffers(), strict=True):
        assert torch.equal(theirs, ours), name  # the rotary frequencies, which no weights file holds
        assert ours.dtype == torch.float32
    with torch.no_grad():
        for name, parameter in named_weights(empty).items():
            parameter.copy_(named_weights(full)[name])
        ids = torch.arange(12)
        assert torch.equal(hidden_states(empty, ids, ids, Causal()), hidden_states(full, ids, ids, Causal()))
        assert torch.equal(output_weight(empty), output_weight(full))


def test_named_weights_are_sorted_and_tied_once(tmp_path: Path) -> None:
    tied = load_model(write(FAMILIES["llama-tied"], tmp_path / "t"), dtype="float32", device="cpu")
    names = list(named_weights(tied))
    assert names == sorted(names)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert output_weight(tied) is named_weights(tied)["model.embed_tokens.weight"]
    separate = load_model(write(FAMILIES["llama"], tmp_path / "s"), dtype="float32", device="cpu")
    assert "lm_head.weight" in named_weights(separate)


def test_resolve_device() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cuda:1") == "cuda:1"


def test_a_rank_on_a_cpu_has_no_card_and_goes_over_gloo() -> None:
    assert use_device("cpu") == "cpu"
    assert [collective_backend(device) for device in ("cpu", "cuda:1")] == ["gloo", "nccl"]
    assert exact_device("cuda:1") == torch.device("cuda", 1)
    assert card_of(exact_device("cpu")) == ""


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    "softcap": (Gemma2Config(**SIZES, head_dim=8), "logit_softcapping"),
    "sliding": (MistralConfig(**SIZES, sliding_window=16), "sliding_window = 16"),
    "sliding-layers": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "sliding_attention",
    ),
    "encoder-decoder": (T5Config(vocab_size=61, d_model=16), "encoder-decoder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_computed_wrongly_is_refused(case: str, tmp_path: Path) -> None:
    config, why = REFUSED[case]
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=why):
        load_model(tmp_path, dtype="float32", device="cpu", weights=False)


def test_a_window_that_no_layer_uses_is_taken(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2)
    load_model(write(config, tmp_path / "m"), dtype="float32", device="cpu")


@pytest.mark.parametrize("weights", [True, False])
def test_a_missing_folder(weights: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no config\.json"):
        load_model(tmp_path / "nowhere", dtype="float32", device="cpu", weights=weights)


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="vit is not supported"):
        load_model(tmp_path, dtype="float32", device="cpu", weights=False)


def test_missing_and_broken_weights(tmp_path: Path) -> None:
    folder = write(FAMILIES["llama"], tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="weights are not readable"):
        load_model(folder, dtype="float32", device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="weights are not readable"):
        load_model(folder, dtype="float32", device="cpu")


def test_a_weights_file_of_a_smaller_model(tmp_path: Path) -> None:
    folder = write(FAMILIES["llama"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"weights are missing .* model\.layers\.2\."):
        load_model(folder, dtype="float32", device="cpu")


# --- new models ------------------------------------------------------------------------------------------------------

NEW = NewModel(alphabet="0123456789+-=\n ab", hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, context=64)


def test_a_new_model_loads_in_transformers_unchanged(tmp_path: Path) -> None:
    create_model(NEW, tmp_path / "m", 7)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = tokenizer("12+3=\n a").input_ids
    assert len(ids) == 8
    assert tokenizer.decode(ids) == "12+3=\n a"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "12+3=\n a"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) == model.config.vocab_size == len(NEW.alphabet) + 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    with pytest.raises(Exception, match="UNK"):  # never a silent <unk>
        tokenizer("é")


def test_a_new_model_is_a_function_of_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        create_model(NEW, tmp_path / name, seed)
    assert torch.equal(torch.get_rng_state(), before)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing temporary is left


def test_an_existing_new_model_is_kept_or_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    create_model(NEW, folder, 7)
    first = (folder / "model.safetensors").stat().st_mtime_ns
    create_model(NEW, folder, 7)
    assert (folder / "model.safetensors").stat().st_mtime_ns == first
    with pytest.raises(ConfigError, match="'seed': 8"):
        create_model(NEW, folder, 8)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not made by this command"):
        create_model(NEW, folder, 7)
    assert (folder / "notes.txt").read_text() == "mine"


def test_two_processes_create_the_same_model_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from engine.models import create_model; from engine.config import NewModel;"
        "create_model(NewModel(alphabet='ab', hidden=32, heads=4, layers=1), sys.argv[1], 3)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"alphabet": ""}, "no character"),
        ({"alphabet": "abca"}, "'a' more than once"),
        ({"heads": 5}, "model.hidden: got 32"),
        ({"heads": 32, "kv_heads": 2}, "even number"),
        ({"kv_heads": 3}, "model.kv_heads: got 3"),
    ],
)
def test_new_model_settings_that_do_not_fit(change: dict, why: str, tmp_path: Path) -> None:
    settings = {"alphabet": "ab", "hidden": 32, "heads": 4, "kv_heads": 2, "layers": 1, "intermediate": 32, **change}
    with pytest.raises(ConfigError, match=why):
        create_model(NewModel(**settings), tmp_path / "m", 0)
    assert list(tmp_path.iterdir()) == []
