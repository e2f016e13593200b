"""One learner rank without its surroundings: model, optimizer and checkpoints, trained step by step from a feed.

A live learner (`workers/learner.py`) is fed by the buffer, a replay (`workers/replay.py`) by a stored log. Both train the
same plans on the same groups in the same order, and so come to the same weights.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.checkpoint import (
    CheckpointError,
    CriticPart,
    latest_checkpoint,
    load_checkpoint,
    load_critic_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from engine.config import Config, ConfigError, PpoObjective, dump_config, policy_folder
from engine.critic import load_critic
from engine.learn_pages import PageLearner
from engine.learn_torch import TorchLearner
from engine.models import load_model, named_weights
from engine.packing import assign
from engine.trained_model import Ranks
from engine.weights import fingerprints, weights_hash
from protocols import messages as m
from workers.provenance import code_version

CRITIC_PREFIX = "critic."
"""Before the names of the critic's weights, where they stand beside the policy's."""


class Feed(Protocol):
    """Where a rank's steps come from."""

    def plan(self, step: int) -> m.Plan:
        """The groups of a step, once they are ready."""
        ...

    def pull(self, step: int, groups: list[int]) -> m.Batch:
        """Groups of the step's plan, in the order asked for."""
        ...


class Diverged(RuntimeError):
    """Re-training a logged step did not give the weights that the log names."""


@dataclass(frozen=True)
class Trained:
    """A step that is trained: what is to be committed, whose fingerprints are of all weights, and those of the policy's."""

    plan: m.Plan
    commit: m.StepCommit
    policy: dict[str, str]


class Trainer:
    """See the module's docstring."""

    def __init__(
        self, config: Config, feed: Feed, *, rank: int, world: int, device: str, folder: Path | None = None
    ) -> None:
        """`folder`: where the model is read, in place of where the config says. Raises `ConfigError` for a model that
        cannot be used."""
        self.config, self.feed, self.rank, self.world = config, feed, rank, world
        self.checkpoints = config.run_dir / "checkpoints"
        self.folder = folder or policy_folder(config)
        self.critic: PreTrainedModel | None = None
        group = dist.group.WORLD if world > 1 else None
        self.learner: TorchLearner | PageLearner
        if config.reads_pages:
            self.learner = PageLearner(config, self.folder, device=device, ranks=Ranks(rank, world, group))
            self.model = self.learner.model
            return
        self.model = load_model(self.folder, dtype=config.learner.dtype, device=device)
        if isinstance(config.objective, PpoObjective):
            self.critic = self._load_critic(device)
        self.learner = TorchLearner(config, self.model, critic=self.critic, rank=rank, world=world, process_group=group)

    def resume(self, until: int) -> int:
        """Loads the newest checkpoint of step `until` at most, if any; returns its step."""
        newest = latest_checkpoint(self.checkpoints, until=until)
        if newest is None:
            return 0
        weights, optimizer, meta = load_checkpoint(newest, like=named_weights(self.model))
        _copy_into(self.model, weights)
        self.learner.load_optimizer_state(optimizer)
        if self.critic is not None and self.learner.critic is not None:
            weights, optimizer = load_critic_checkpoint(newest, like=named_weights(self.critic))
            _copy_into(self.critic, weights)
            self.learner.critic.optimizer.load_state(optimizer)
            try:
                self.learner.pretraining.load(meta["pretraining"])
            except (KeyError, msgspec.ValidationError) as error:
                raise CheckpointError(f"checkpoint {newest}: its value pretraining cannot be read: {error}") from error
        print(f"learner-{self.rank}: continues from {newest}", file=sys.stderr, flush=True)
        return int(meta["step"])

    def pull(self, step: int) -> tuple[m.Plan, list[m.Batch]]:
        """The step's plan and this rank's share of every update; a plan of fewer groups makes fewer updates, or none."""
        plan = self.feed.plan(step)
        count = min(self.config.learner.updates_per_step, len(plan.groups))
        shares = assign(plan.groups, updates=count, ranks=self.world) if count else []
        updates = [share[self.rank] for share in shares]
        return plan, [self.feed.pull(step, groups) if groups else empty_batch(step) for groups in updates]

    def train(self, plan: m.Plan, updates: list[m.Batch], *, wait_s: float) -> Trained:
        """Trains one step; raises `Diverged` when the log has it with other weights, and trains nothing further."""
        started_at = time.time()
        pretrained = self.learner.pretraining.over
        metrics = self.learner.step(plan.step, updates)
        finished_at = time.time()
        if self.learner.pretraining.over and not pretrained:
            self._say_pretrained(plan.step, metrics)
        metrics |= {"wait_s": wait_s, "train_s": finished_at - started_at}
        policy = fingerprints(named_weights(self.model))
        critic = fingerprints(named_weights(self.critic)) if self.critic is not None else {}
        everything = policy | {f"{CRITIC_PREFIX}{name}": value for name, value in critic.items()}
        digest = weights_hash(everything)
        if plan.weights_hash is not None and plan.weights_hash != digest:
            raise Diverged(
                f"learner: re-trained step {plan.step} to {digest}, the log has {plan.weights_hash}: "
                "expected equal weights (same machine, thread count and code version?)"
            )
        commit = m.StepCommit(plan.step, digest, code_version(), started_at, finished_at, metrics, everything)
        return Trained(plan, commit, policy)

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of held-out pages, where pages are read and it is time for them."""
        every, config = self.config.eval.every, self.config
        due = step == config.steps or (every and step % every == 0)
        return self.learner.evaluate() if due and isinstance(self.learner, PageLearner) else {}

    def save(self, trained: Trained) -> None:
        """Writes the step's checkpoint and removes old ones."""
        step = trained.plan.step
        meta = {
            "step": step,
            "weights_hash": trained.commit.weights_hash,
            "code_version": code_version(),
            "config": dump_config(self.config),
        }
        critic = None
        if self.critic is not None and self.learner.critic is not None:
            meta["pretraining"] = self.learner.pretraining.state()
            critic = CriticPart(self.critic, self.critic_source, self.learner.critic.optimizer.state())
        save_checkpoint(
            self.checkpoints,
            step,
            model=self.model,
            source_folder=self.folder,
            optimizer=self.learner.optimizer_state(),
            meta=meta,
            critic=critic,
        )
        prune_checkpoints(self.checkpoints, self.config.learner.keep_checkpoints)

    def _load_critic(self, device: str) -> PreTrainedModel:
        critic = self.config.critic
        if critic is None:
            raise ConfigError(f"{self.config.source}: this objective trains a critic, and there is no [critic]")
        self.critic_source = Path(critic.path) if critic.path is not None else self.folder
        return load_critic(critic.path, self.folder, dtype=self.config.learner.dtype, device=device)

    def _say_pretrained(self, step: int, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            why = "has levelled off" if self.learner.pretraining.steps < self.learner.pretraining.limit else "is over"
            print(
                f"learner: value pretraining {why} after step {step}: value loss {metrics['value_loss']:.4f}, explained variance "
                f"{metrics['explained_variance']:.3f}; from step {step + 1} on the policy is trained too",
                file=sys.stderr,
                flush=True,
            )


def _copy_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in named_weights(model).items():
            parameter.copy_(weights[name])


def empty_batch(step: int) -> m.Batch:
    """The share of a rank that has no group in an update; it takes part in the collectives all the same."""
    ints, floats, bools = np.zeros(0, m.INT), np.zeros(0, m.FLOAT), np.zeros(0, m.BOOL)
    return m.Batch(
        step=step, groups=ints, prompt_lengths=ints, prompts=ints, sizes=ints, lengths=ints, tokens=ints,
        logprobs=floats, versions=ints, rewards=floats, correct=bools, truncated=bools,
    )  # fmt: skip
