"""One rank of `test_deepspeed`: trains two steps for each job, in the plain form and with DeepSpeed; writes what it got."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learner_cases import make_batch, make_config, select, tiny_critic, tiny_model
from learner_rank import GROUPS, PPO, SHARES
from safetensors.torch import load_file, save_file

from engine.config import Config, ConfigError
from engine.learn_torch import TorchLearner
from engine.models import named_weights
from engine.trained_model import NonFiniteError
from protocols.messages import Batch

COMMON: dict[str, Any] = {"updates_per_step": 2, "token_budget": 16, "bucket_mb": 1, "grad_clip": 0.05, "lr": 1e-3}
JOBS: dict[str, dict[str, Any]] = {
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero3": {"zero": 3, "whole_below": 0},
    "zero2-offload": {"zero": 2, "offload": True},
    "zero3-offload": {"zero": 3, "offload": True},
    "zero1-bfloat16": {"zero": 1},
    "zero3-bfloat16": {"zero": 3, "whole_below": 0},
    "zero3-layers": {"zero": 3, "whole_below": 0},
    "zero3-ppo": {"zero": 3, "whole_below": 0},
    "zero3-untied": {"zero": 3, "whole_below": 0},
}
"""`learner.backend` of each; the name says the rest."""
SEEDS = {1: (0, 1), 2: (2, 3)}
"""Step to the seeds of its updates."""


def settings(job: str) -> tuple[Config, torch.dtype]:
    dtype = "bfloat16" if "bfloat16" in job else "float32"
    ppo = "ppo" in job
    backend = {"type": "deepspeed", **JOBS[job]} if job in JOBS else {"type": "torch"}
    config = make_config(
        objective=PPO if ppo else {},
        critic={"value_clip": 0.2, "grad_clip": 0.05, "lr": 2e-3} if ppo else None,
        backend=backend,
        dtype=dtype,
        gradient_checkpointing="layers" in job,
        **COMMON,
    )
    return config, getattr(torch, dtype)


def make_learner(job: str, rank: int, world: int) -> TorchLearner:
    """A job's name behind "torch-" asks for the plain form."""
    config, dtype = settings(job)
    kind = "qwen2" if "untied" in job else "llama"
    model, critic = tiny_model(kind, dtype), tiny_critic() if "ppo" in job else None
    if rank > 0 and job in JOBS:  # it has the weights from the first rank
        with torch.no_grad():
            for weight in chain(model.parameters(), critic.parameters() if critic is not None else ()):
                weight.fill_(torch.nan)
    return TorchLearner(config, model, critic=critic, rank=rank, world=world)


def updates(step: int, rank: int | None) -> list[Batch]:
    """This rank's share of every update of a step; all of it for None."""
    made = []
    for seed, shares in zip(SEEDS[step], SHARES, strict=True):
        groups = list(chain(*shares)) if rank is None else shares[rank]
        made.append(select(make_batch(GROUPS, seed=seed, step=step), groups))
    return made


def state_of(learner: TorchLearner) -> dict[str, torch.Tensor]:
    """All weights and the optimizers' states, whole."""
    found = {name: tensor.detach().clone() for name, tensor in learner.weights().items()}
    found |= {f"optimizer.{name}": tensor.detach().clone() for name, tensor in learner.optimizer_state().items()}
    if learner.critic is not None:
        found |= {f"critic.{name}": tensor.detach().clone() for name, tensor in learner.critic.weights().items()}
    return found


def load_state(learner: TorchLearner, state: dict[str, torch.Tensor]) -> None:
    """Takes over what `state_of` gave of a policy."""
    optimizer = {name.removeprefix("optimizer."): t for name, t in state.items() if name.startswith("optimizer.")}
    learner.load({name: tensor for name, tensor in state.items() if not name.startswith("optimizer.")}, optimizer)


def train(learner: TorchLearner, name: str, steps: tuple[int, ...], folder: Path, *, rank: int, world: int) -> None:
    """Writes FOLDER/NAME-STEP.json (metrics) and .safetensors (state) after each step."""
    for step in steps:
        metrics = learner.step(step, updates(step, rank if world > 1 else None))
        state = state_of(learner)
        (folder / f"{name}-{step}-{rank}.json").write_text(json.dumps(metrics))
        save_file(state, folder / f"{name}-{step}-{rank}.safetensors")


def most_at_once(rank: int, folder: Path) -> None:
    """How many bytes of whole weights there are while all of them are gathered in buckets of 8 kB."""
    learner = make_learner("zero3", rank, 2)
    assert learner.policy is not None
    learner.policy.bucket_bytes = 8192
    weights = learner.weights()
    whole = [sum(weight.nbytes for weight in named_weights(learner.model).values()) for _ in weights.items()]
    sizes = {name: weight.nbytes for name, weight in weights.like.items()}
    (folder / f"buckets-{rank}.json").write_text(json.dumps([whole, sizes]))


def poison(job: str, rank: int, folder: Path) -> None:
    """One rank's data make the loss infinite."""
    learner = make_learner(job, rank, 2)
    batches = [select(make_batch(GROUPS, seed=0), shares) for shares in ([0, 2], [1, 3])]
    if rank == 1:
        batches[rank].rewards[:] = float("inf")
    before = state_of(learner)
    try:
        learner.step(1, [batches[rank]])
    except NonFiniteError as error:
        same = all(torch.equal(tensor, before[name]) for name, tensor in learner.weights().items())
        (folder / f"poison-{rank}.error").write_text(f"{error} unchanged={same}")


def main(rank: int, world: int, folder: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    if world > 1:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for job in jobs:
        name, _, start = job.partition(":")
        if name == "types":
            try:
                TorchLearner(settings("zero3")[0], tiny_model(dtype=torch.bfloat16), rank=rank, world=world)
            except ConfigError as error:
                (folder / f"types-{rank}.error").write_text(str(error))
            continue
        if name == "buckets":
            most_at_once(rank, folder)
            continue
        if name == "poison":
            poison("zero3", rank, folder)
            continue
        learner = make_learner(name, rank, world)
        if start:  # the state after step 1 of another job goes on
            load_state(learner, load_file(folder / f"{start}-1-0.safetensors"))
            train(learner, f"{name}:{start}:{world}", (2,), folder, rank=rank, world=world)
        else:
            train(learner, name, (1, 2), folder, rank=rank, world=world)
    if world > 1:
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
