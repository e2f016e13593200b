"""A checkpoint is a Hugging Face folder, is there whole or not at all, and says so when it is damaged or a stranger's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint import (
    CheckpointError,
    Part,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from engine.config import NewModel
from engine.gathered import held
from engine.models import create_model, load_model, named_weights
from engine.text import TextModel

NEW = NewModel(alphabet="01+=", hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, context=64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    create_model(NEW, tmp_path / "source", 1)
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return tmp_path / "source"


def save(source: Path, root: Path, step: int, *, dtype: str = "float32", shift: float = 0.5) -> tuple[Path, dict]:
    model = load_model(source, dtype=dtype, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift)
    whole = torch.arange(20.0)
    optimizer = {
        "exp_avg/a": whole[:10],
        "exp_avg/c": whole[5:15],
        "exp_avg/b": whole[10:].reshape(2, 5).T,
        "step": torch.tensor(3, dtype=torch.int64),
    }
    meta = {"weights_hash": "ab12", "code_version": "0.1", "config": {"name": "r", "steps": 9}}
    path = save_checkpoint(root, step, Part(held(named_weights(model)), held(optimizer), source), meta=meta)
    return path, {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}


def test_what_was_saved_comes_back(source: Path, tmp_path: Path) -> None:
    path, expected = save(source, tmp_path / "checkpoints", 50)
    assert path == tmp_path / "checkpoints" / "step-000050" == latest_checkpoint(tmp_path / "checkpoints")
    weights, optimizer, meta = load_checkpoint(path, like=expected)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(optimizer["exp_avg/a"], torch.arange(10.0))
    assert torch.equal(optimizer["exp_avg/b"], torch.arange(10.0, 20.0).reshape(2, 5).T)
    assert torch.equal(optimizer["exp_avg/c"], torch.arange(5.0, 15.0))
    assert int(optimizer["step"]) == 3
    assert meta["step"] == 50
    assert meta["weights_hash"] == "ab12"
    assert meta["config"] == {"name": "r", "steps": 9}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_loads_in_transformers_unchanged(dtype: str, source: Path, tmp_path: Path) -> None:
    path, expected = save(source, tmp_path / "checkpoints", 1, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == getattr(torch, dtype)  # the config says what the file holds
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = AutoTokenizer.from_pretrained(path)("1+0=").input_ids
    model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
    text = TextModel.load(path)
    assert text.encode("1+0=").tolist() == ids
    assert text.has_chat_template
    assert not (path / "headrace_model.json").exists()  # it speaks of the fresh model


def test_a_checkpoint_is_a_source_folder_too(source: Path, tmp_path: Path) -> None:
    first, _ = save(source, tmp_path / "first", 7)
    second, expected = save(first, tmp_path / "second", 1)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    assert load_checkpoint(second, like=expected)[2]["step"] == 1


def test_sharded_weights_are_saved_as_one_file(source: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="10KB")
    (source / "model.safetensors").unlink()
    path, _ = save(source, tmp_path / "checkpoints", 1)
    assert not (path / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(path)


def test_latest_goes_by_number_and_ignores_the_rest(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert latest_checkpoint(root) is None
    save(source, root, 999_999)
    save(source, root, 1_000_000)
    (root / ".step-2000000-x").mkdir()
    (root / "step-9").mkdir()
    (root / "step-3000000.old").mkdir()
    assert latest_checkpoint(root) == root / "step-1000000"


def test_a_step_that_is_saved_again_is_replaced(source: Path, tmp_path: Path) -> None:
    save(source, tmp_path / "c", 5, shift=0.5)
    path, expected = save(source, tmp_path / "c", 5, shift=0.25)
    weights, _, _ = load_checkpoint(path)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["step-000005"]


def test_prune_keeps_the_newest_and_clears_what_was_left(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (1, 2, 3, 10):
        save(source, root, step)
    (root / ".step-000004-abc").mkdir()
    prune_checkpoints(root, 2)
    assert sorted(entry.name for entry in root.iterdir()) == ["step-000003", "step-000010"]
    with pytest.raises(ValueError, match="keep: got 0"):
        prune_checkpoints(root, 0)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_file_is_named(name: str, damage: str, source: Path, tmp_path: Path) -> None:
    path, _ = save(source, tmp_path / "c", 1)
    data = bytearray((path / name).read_bytes())
    if damage == "gone":
        (path / name).unlink()
    elif damage == "cut":
        (path / name).write_bytes(data[:-8])
    else:
        data[-3] ^= 1
        (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"step-000001: {name} is damaged"):
        load_checkpoint(path)


def test_a_broken_or_foreign_meta_file(source: Path, tmp_path: Path) -> None:
    path, _ = save(source, tmp_path / "c", 1)
    document = json.loads((path / "headrace.json").read_text())
    (path / "headrace.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 1"):
        load_checkpoint(path)
    (path / "headrace.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"headrace\.json cannot be read"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"headrace\.json cannot be read"):
        load_checkpoint(tmp_path / "nowhere")


def test_another_models_checkpoint_is_refused_by_its_first_tensor(source: Path, tmp_path: Path) -> None:
    path, expected = save(source, tmp_path / "c", 1)
    wider = {**expected, "model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)}
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight: got \(48, 32\), expected \(64, 32\)"):
        load_checkpoint(path, like=wider)
    shallower = {name: tensor for name, tensor in expected.items() if "layers.1" not in name}
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.input_layernorm\.weight: got \(32,\), expected no such tensor"
    ):
        load_checkpoint(path, like=shallower)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: got no such tensor, expected"):
        load_checkpoint(path, like={**expected, "lm_head.weight": torch.zeros(6, 32)})


# --- a disk that is full, a process that dies -------------------------------------------------------------------------

WRITER = """
import resource, signal, sys
from pathlib import Path
import torch
from engine.checkpoint import CheckpointError, Part, save_checkpoint
from engine.gathered import held
from engine.models import load_model, named_weights
source, root, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model = load_model(source, dtype="float32", device="cpu")
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
big = {"exp_avg": torch.zeros(4_000_000)}
try:
    for step in range(2, 3 if limit else 10_000):
        save_checkpoint(root, step, Part(held(named_weights(model)), held(big), source), meta={})
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""


def writer(source: Path, root: Path, limit: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(source), str(root), str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_disk_that_takes_no_more_leaves_the_older_checkpoints(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "c"
    first, _ = save(source, root, 1)
    process = writer(source, root, 1_000_000)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "step-000002: cannot be written" in out
    assert [entry.name for entry in root.iterdir()] == [first.name]
    load_checkpoint(first)


def test_a_writer_that_is_killed_leaves_no_half_written_checkpoint(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "c"
    caught = 0
    for pause in (0.0, 0.03):
        process = writer(source, root, 0)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 30
            while not any(root.glob(".step-*")) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(pause)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        caught += any(root.glob(".step-*"))
        for path in root.glob("step-*"):
            load_checkpoint(path)
        save(source, root, 20_000)
        prune_checkpoints(root, 1)
        assert [entry.name for entry in root.iterdir()] == ["step-020000"]
    assert caught > 0, "no writer was killed while it wrote"


def test_a_checkpoint_beyond_the_log_is_not_the_latest_of_it(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    older, newer = (save(source, root, step)[0] for step in (3, 5))
    assert latest_checkpoint(root) == newer
    assert latest_checkpoint(root, until=4) == older
    assert latest_checkpoint(root, until=2) is None
