"""One rank of `test_learn_torch`'s two-process tests: trains its share of a step for each job, writes what it got."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from learner_cases import make_batch, make_config, select, tiny_critic, tiny_model
from safetensors.torch import save_file

from engine.config import ConfigError
from engine.learn_torch import NonFiniteError, TorchLearner
from engine.models import named_weights
from engine.rank_versions import check_same_versions
from engine.trained_model import Ranks
from protocols.messages import Batch

GROUPS = [(5, [3, 1, 9]), (4, [2, 6, 4]), (12, [8, 3, 4]), (3, [1, 2])]
SHARES = [[[0, 2], [1, 3]], [[0, 1, 2, 3], []]]
"""[update][rank]: the second rank has nothing in the second update."""
COMMON = {"updates_per_step": 2, "token_budget": 16, "bucket_mb": 1, "grad_clip": 0.0}
PPO = {"type": "ppo", "loss": "token", "lam_actor": {"alpha": 0.2}, "lam_critic": 0.9, "gamma": 0.98, "whiten": True,
       "positive_nll": 0.3}  # fmt: skip
JOBS = {
    "token": {"loss": "token"},
    "sequence": {"loss": "sequence"},
    "ppo": PPO,
    "ppo-sequence": PPO | {"loss": "sequence", "whiten": False},
    "poison": {},
}


def updates(rank: int | None) -> list[Batch]:
    """This rank's share of every update; all of it for None."""
    made = []
    for seed, shares in enumerate(SHARES):
        groups = list(chain(*shares)) if rank is None else shares[rank]
        made.append(select(make_batch(GROUPS, seed=seed), groups))
    return made


def train(job: str, rank: int, world: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics, and the last gradients and the weights by name."""
    model, critic = tiny_model(), tiny_critic() if job.startswith("ppo") else None
    settings = {"value_clip": 0.2, "grad_clip": 0.0} if critic is not None else None
    config = make_config(objective=JOBS[job], critic=settings, **COMMON)
    learner = TorchLearner(config, model, critic=critic, rank=rank, world=world)
    if job == "poison" and rank == 1:
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(torch.nan)
    metrics = learner.step(1, updates(rank if world > 1 else None))
    found = {"gradient": learner.optimizer.gradient, **named_weights(model)}
    if critic is not None and learner.critic is not None:
        found |= {f"critic.{name}": weight for name, weight in named_weights(critic).items()}
        found["critic.gradient"] = learner.critic.optimizer.gradient
    return metrics, found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        check_same_versions(Ranks(rank, 2), "cpu", {"torch": "2.13.0", "DeepSpeed": f"0.19.{7 + rank}"})
    except ConfigError as error:
        (folder / f"versions{rank}.error").write_text(str(error))
    check_same_versions(Ranks(rank, 2), "cpu", {"torch": "2.13.0"})
    for job in JOBS:
        try:
            metrics, tensors = train(job, rank, 2)
        except NonFiniteError as error:
            (folder / f"{job}{rank}.error").write_text(str(error))
            continue
        save_file(tensors, folder / f"{job}{rank}.safetensors")
        (folder / f"{job}{rank}.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
