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
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from engine.backends import load_place, reads_weights, versions
from engine.checkpoint import (
    CheckpointError,
    Part,
    critic_part,
    latest_checkpoint,
    load_checkpoint,
    load_critic_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from engine.config import Config, ConfigError, PpoObjective, dump_config
from engine.critic import load_critic
from engine.gathered import Gathered
from engine.learn_pages import PageLearner
from engine.learn_torch import TorchLearner
from engine.models import bare_model, load_model
from engine.packing import assign
from engine.rank_versions import check_same_versions
from engine.start_folder import policy_folder
from engine.trained_model import Ranks
from engine.weights import fingerprint, weights_hash
from protocols import messages as m
from workers.no_data import empty_batch
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
        ranks = Ranks(rank, world, group)
        check_same_versions(ranks, device, {"headrace": code_version(), **versions(config.learner)})
        self.learner: TorchLearner | PageLearner
        if config.reads_pages:
            self.learner = PageLearner(config, self.folder, device=device, ranks=ranks)
            self.model: nn.Module = self.learner.model
            return
        place, reads = load_place(config.learner, device), reads_weights(config.learner, rank)
        dtype = config.learner.dtype
        model = load_model(self.folder, dtype=dtype, device=place) if reads else bare_model(self.folder, dtype=dtype)
        self.model = model
        if isinstance(config.objective, PpoObjective):
            self.critic = self._load_critic(place, reads)
        self.learner = TorchLearner(config, model, critic=self.critic, rank=rank, world=world, process_group=group)

    def resume(self, until: int) -> int:
        """Loads the newest checkpoint of step `until` at most, if any; returns its step."""
        newest = latest_checkpoint(self.checkpoints, until=until)
        if newest is None:
            return 0
        weights, optimizer, meta = load_checkpoint(newest, like=self.learner.weights().like)
        self.learner.load(weights, optimizer)
        if self.learner.critic is not None:
            critic = self.learner.critic
            critic.load(*load_critic_checkpoint(newest, like=critic.weights().like))
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
        policy = _fingerprints(self.learner.weights())
        critic = _fingerprints(self.learner.critic.weights()) if self.learner.critic is not None else {}
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
        """Writes the step's checkpoint and removes old ones. All ranks call this; the first one writes."""
        step = trained.plan.step
        meta = {
            "step": step,
            "weights_hash": trained.commit.weights_hash,
            "code_version": code_version(),
            "config": dump_config(self.config),
        }
        policy = Part(self.learner.weights(), self.learner.optimizer_state(), self.folder)
        critic = None
        if self.critic is not None and self.learner.critic is not None:
            trained_critic = self.learner.critic
            meta["pretraining"] = self.learner.pretraining.state()
            critic = critic_part(
                self.critic, trained_critic.weights(), trained_critic.optimizer_state(), self.critic_source
            )
        if self.rank > 0:
            policy.take_part()
            if critic is not None:
                critic.take_part()
            return
        save_checkpoint(self.checkpoints, step, policy, meta=meta, critic=critic)
        prune_checkpoints(self.checkpoints, self.config.learner.keep_checkpoints)

    def _load_critic(self, device: str, weights: bool) -> PreTrainedModel:
        critic = self.config.critic
        if critic is None:
            raise ConfigError(f"{self.config.source}: this objective trains a critic, and there is no [critic]")
        self.critic_source = Path(critic.path) if critic.path is not None else self.folder
        return load_critic(critic.path, self.folder, dtype=self.config.learner.dtype, device=device, weights=weights)

    def _say_pretrained(self, step: int, metrics: dict[str, float]) -> None:
        if self.rank == 0:
            why = "has levelled off" if self.learner.pretraining.steps < self.learner.pretraining.limit else "is over"
            print(
                f"learner: value pretraining {why} after step {step}: value loss {metrics['value_loss']:.4f}, explained variance "
                f"{metrics['explained_variance']:.3f}; from step {step + 1} on the policy is trained too",
                file=sys.stderr,
                flush=True,
            )


def _fingerprints(weights: Gathered) -> dict[str, str]:
    return {name: fingerprint(tensor) for name, tensor in weights.items()}
