"""Checkpoints: a Hugging Face folder that `transformers` loads unchanged, plus the optimizer's state. A critic has the same
in a folder of its own within.

A folder gets its name only when every byte of it is on disk, so one with a checkpoint's name is whole. The digests in
`headrace.json` catch what happened to its files later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from engine.critic import FOLDER as CRITIC
from engine.critic import folder_settings
from engine.gathered import Gathered, held
from engine.models import named_weights
from engine.tensor_file import StoredTensors, write_tensors

WEIGHTS, OPTIMIZER, META = "model.safetensors", "optimizer.safetensors", "headrace.json"
FORMAT = 1

_NAME = re.compile(r"step-(\d{6,})")
_COPIED = {".json", ".jinja", ".txt", ".model"}
_CHUNK = 1 << 24


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model."""


@dataclass(frozen=True)
class Part:
    """A model for a checkpoint; `source_folder` is where its tokenizer and its config are copied from, and `settings` is
    what its config.json says beyond that one."""

    weights: Gathered
    optimizer: Gathered
    source_folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict)

    def take_part(self) -> None:
        """On every rank that does not write, while one does."""
        self.weights.take_part()
        self.optimizer.take_part()


def critic_part(critic: PreTrainedModel, weights: Gathered, optimizer: Gathered, source_folder: Path) -> Part:
    """The part of a critic."""
    return Part(weights, optimizer, source_folder, folder_settings(critic))


def save_checkpoint(
    root: Path,
    step: int,
    policy: Part,
    *,
    meta: Mapping[str, Any],
    critic: Part | None = None,
) -> Path:
    """Write ROOT/step-NNNNNN and return it; one of that name is replaced. Where ranks hold parts, one of them writes and all
    others call the `take_part` of the policy, then of the critic.

    The weights keep their dtype; config, tokenizer and chat template are copied from the source folder; `meta` is plain
    JSON data and comes back from `load_checkpoint`. Tensors are written one after another. Raises `CheckpointError` when
    the disk does not take it; nothing of it is left then, and older checkpoints are as they were.
    """
    final = root / f"step-{step:06d}"

    def write(folder: Path) -> None:
        names = [WEIGHTS, OPTIMIZER]
        _write_part(folder, policy)
        if critic is not None:
            names += [f"{CRITIC}/{WEIGHTS}", f"{CRITIC}/{OPTIMIZER}"]
            (folder / CRITIC).mkdir()
            _write_part(folder / CRITIC, critic)
        files = {name: _digest(folder / name) for name in names}
        document = {"format": FORMAT, "files": files, "meta": {"step": step, **meta}}
        (folder / META).write_text(json.dumps(document, indent=1), encoding="utf-8")

    _write_whole(final, write, f"checkpoint {final}")
    return final


def save_critic(
    folder: Path,
    critic: PreTrainedModel,
    source_folder: Path,
    write: Callable[[Path], None],
    weights: Gathered | None = None,
) -> None:
    """Write a critic's Hugging Face folder; `write` adds more files to it before it gets its name. `weights` are named where
    ranks hold parts of them. Raises `CheckpointError` when the disk does not take it, or there is a folder of that name."""
    if folder.exists():
        raise CheckpointError(f"critic {folder}: exists already")

    def both(temporary: Path) -> None:
        _write_model(temporary, weights or held(named_weights(critic)), source_folder, folder_settings(critic))
        write(temporary)

    _write_whole(folder, both, f"critic {folder}")


def latest_checkpoint(root: Path, *, until: int | None = None) -> Path | None:
    """The checkpoint of the highest step in `root`, of `until` at most; None without one (or without `root`)."""
    found = [path for step, path in _checkpoints(root) if until is None or step <= until]
    return found[-1] if found else None


def load_checkpoint(
    path: Path, *, like: Mapping[str, Tensor] | None = None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], dict[str, Any]]:
    """(weights by Hugging Face name, optimizer tensors, meta) of one checkpoint, on the CPU, each tensor read when it is
    asked for.

    Raises `CheckpointError` for a missing or damaged file, and, with `like` (a model's `named_weights`), for the first
    tensor that differs in name, shape or type.
    """
    document = _read_meta(path)
    weights, optimizer = (_read_tensors(path, name, document["files"]) for name in (WEIGHTS, OPTIMIZER))
    if like is not None:
        _check_same(path, weights, like)
    return weights, optimizer, document["meta"]


def load_critic_checkpoint(
    path: Path, *, like: Mapping[str, Tensor] | None = None
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """(weights, optimizer tensors) of the critic in one checkpoint, on the CPU. Raises `CheckpointError` as
    `load_checkpoint` does, and for a checkpoint of a run that had no critic."""
    files = _read_meta(path)["files"]
    names = (f"{CRITIC}/{WEIGHTS}", f"{CRITIC}/{OPTIMIZER}")
    if missing := [name for name in names if name not in files]:
        raise CheckpointError(
            f"checkpoint {path}: it has no critic ({missing[0]} is not among its files); expected one of a run that trains one"
        )
    weights, optimizer = (_read_tensors(path, name, files) for name in names)
    if like is not None:
        _check_same(path / CRITIC, weights, like)
    return weights, optimizer


def prune_checkpoints(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` (at least 1) checkpoints, and what a killed writer left behind."""
    if keep < 1:
        raise ValueError(f"keep: got {keep}, expected at least 1")
    for _, old in _checkpoints(root)[:-keep]:
        hidden = old.with_name(f".{old.name}-removed")
        os.rename(old, hidden)  # first, so that no half-removed folder carries a checkpoint's name
    for left in root.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _checkpoints(root: Path) -> list[tuple[int, Path]]:
    steps = {int(match[1]): path for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return sorted(steps.items())


def _check_same(path: Path, weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    for name in sorted({*weights, *like}):
        own, other = weights.get(name), like.get(name)
        got = tuple(own.shape) if own is not None else "no such tensor"
        expected = tuple(other.shape) if other is not None else "no such tensor"
        if got != expected:
            raise CheckpointError(f"checkpoint {path}: of another model: {name}: got {got}, expected {expected}")
        if own is not None and other is not None and own.dtype != other.dtype:
            raise CheckpointError(
                f"checkpoint {path}: of another type: {name}: got {own.dtype}, expected {other.dtype}, as learner.dtype says"
            )


def _read_tensors(path: Path, name: str, files: Mapping[str, str]) -> Mapping[str, Tensor]:
    expected, got = files[name], _digest(path / name)
    if got != expected:
        raise CheckpointError(f"checkpoint {path}: {name} is damaged: got {got}, expected {expected}")
    try:
        return StoredTensors(path / name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: {name} cannot be read: {error}") from error


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / META).read_text(encoding="utf-8"))
        version = document["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {META} cannot be read: {error}") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {version}, expected {FORMAT}; written by another release")
    return document


def _write_whole(final: Path, write: Callable[[Path], None], where: str) -> None:
    """What `write` puts into a folder gets its name when it is on disk, or is gone."""
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
        write(temporary)
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{where}: cannot be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_part(folder: Path, part: Part) -> None:
    _write_model(folder, part.weights, part.source_folder, part.settings)
    write_tensors(folder / OPTIMIZER, part.optimizer)


def _write_model(folder: Path, weights: Gathered, source: Path, settings: Mapping[str, Any]) -> None:
    _copy_source(source, folder, weights.like, settings)
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})


def _copy_source(source: Path, target: Path, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    for file in sorted(source.iterdir()):
        ours = file.name.startswith("headrace") or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _COPIED and not ours:
            shutil.copyfile(file, target / file.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # its older name; `transformers` loads in the dtype that stands here
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config | settings, indent=2), encoding="utf-8")


def _digest(file: Path) -> str:
    """xxh3-128 of a file's bytes; "missing" without one."""
    state = xxhash.xxh3_128()
    try:
        with file.open("rb") as data:
            while chunk := data.read(_CHUNK):
                state.update(chunk)
    except FileNotFoundError:
        return "missing"
    return state.hexdigest()


def _publish(temporary: Path, final: Path) -> None:
    temporary.chmod(0o755)
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    if final.exists():
        replaced = final.with_name(f".{final.name}-replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        os.rename(temporary, final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(temporary, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
