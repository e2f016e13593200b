"""The learner: one process per rank. How a model, its gradient and its optimizer lie on the ranks is the backend's affair
(`engine.trained_model`): in plain PyTorch every rank has the whole of them.

One rollout step is one or more updates. Each update's gradient is that of one loss over all of its tokens, whatever their
split: micro-batches of packed rows add to it one after another, ranks are summed at the end, and the denominators were
counted over all ranks before. A rank without data in an update still takes part in its collectives, and where the backend
wants ranks to keep in step, in its micro-batches.

With a critic, each update is one of the policy and one of the critic, on the same packed rows. The first steps may train
the critic alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from engine.backends import make_trained_model
from engine.config import Config, CriticConfig, LearnerConfig
from engine.critic import token_values
from engine.gathered import Gathered, held
from engine.host_memory import return_freed_tensors
from engine.level_off import Pretraining
from engine.logprobs import token_logprobs
from engine.models import hidden_states, named_weights, output_weight
from engine.objectives import Objective, Targets, make_objective, make_pretraining
from engine.optimizer import Optimizer
from engine.packing import Pack, idle_pack, pack
from engine.totals import Totals
from engine.trained_model import NonFiniteError, Ranks, TrainedModel
from engine.trained_torch import TorchModel
from protocols.messages import Batch

__all__ = ["NonFiniteError", "TorchLearner"]

LARGE_MODEL = 32_000_000
"""Parameters from which on a CPU learner's memory counts for more than the time that fresh pages cost."""


@dataclass(frozen=True)
class Update:
    """This rank's share of one update. `counts` are over all ranks; `old` is empty where the policy is that of the start."""

    batch: Batch
    packs: list[Pack]
    targets: Targets
    counts: np.ndarray
    old: list[Tensor]


class TorchLearner:
    """Trains `model`, and `critic` where the objective has one, in place. `rank`, `world` and `process_group` (None: the
    default group) place this process. `model` is None where only the critic is ever trained."""

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel | None,
        *,
        critic: PreTrainedModel | None = None,
        rank: int = 0,
        world: int = 1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        models = [found for found in (model, critic) if found is not None]
        self.settings, self.model, self.ranks = config.learner, model, Ranks(rank, world, process_group)
        self.device = next(models[0].parameters()).device
        # Rollouts carry log-probabilities of the temperature-scaled softmax; the same distribution is trained.
        self.temperature = config.generator.sampling.temperature if config.generator else 1.0
        self.objective, self.value_objective = make_objective(config), make_pretraining(config)
        self.pretraining = Pretraining(config.critic if critic is not None else None)
        if self.device.type == "cpu" and max(found.num_parameters() for found in models) >= LARGE_MODEL:
            return_freed_tensors()
        self.policy: TrainedModel | None = None
        self.critic: TrainedModel | None = None
        if model is not None and self.objective.policy_loss is not None:
            self.policy = self._trained("policy", model, config.learner)
        if critic is not None and config.critic is not None:
            self.critic = self._trained("critic", critic, config.critic)
        self.device = next((own.device for own in (self.policy, self.critic) if own is not None), self.device)
        if self.objective.value_loss is not None and self.critic is None:
            raise ValueError(
                f"objective {config.objective.__struct_config__.tag}: got no critic, expected one to train"
            )

    def step(self, step: int, updates: list[Batch]) -> dict[str, float]:
        """Train rollout step `step` (from 1) on this rank's share of each of its updates; the step's metrics, the same on
        every rank. Raises `NonFiniteError` before anything not finite reaches the weights."""
        objective = self.objective if self.pretraining.over else self.value_objective
        totals = Totals({**_SUMS, **objective.sums}, self.device)
        prepared = self._prepare(objective, step, updates)
        rates = self._rates(objective, step)
        losses: dict[str, list[tuple[float, float]]] = {name: [] for name in rates}
        for index, update in enumerate(prepared):
            totals.add(_batch_sums(update.batch, update.targets, update.packs))
            totals.add(update.targets.sums)
            if update.counts[0] == 0:
                continue  # every token of the update is masked, on every rank: there is nothing to learn from
            where = f"step {step}, update {index + 1} of {len(updates)}"
            for name, found in self._train(objective, update, rates, where, totals).items():
                losses[name].append(found)
        metrics = {"updates": float(max(map(len, losses.values()), default=0))}
        for name, (loss, norm, lr) in _NAMES.items():
            if name in rates:
                metrics |= {loss: _mean(losses[name], 0), norm: _mean(losses[name], 1), lr: rates[name]}
        metrics |= self._metrics(objective, totals)
        if not self.pretraining.over:
            self.pretraining.add(metrics)
        return metrics

    def _trained(self, name: str, model: PreTrainedModel, settings: LearnerConfig | CriticConfig) -> TrainedModel:
        return make_trained_model(name, model, settings, learner=self.settings, ranks=self.ranks)

    @property
    def optimizer(self) -> Optimizer:
        """The policy's, where it is whole on every rank."""
        if not isinstance(self.policy, TorchModel):
            raise ValueError("learner: there is no optimizer of the policy that is whole on this rank")
        return self.policy.optimizer

    def weights(self) -> Gathered:
        """The policy's weights by Hugging Face name, for its hash, a checkpoint or the generators."""
        if self.policy is not None:
            return self.policy.weights()
        return held(named_weights(self.model) if self.model is not None else {})

    def optimizer_state(self) -> Gathered:
        """The state of the policy's optimizer by name, for a checkpoint. Empty where the policy is not trained."""
        return self.policy.optimizer_state() if self.policy is not None else held({})

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Continue from `weights()` and `optimizer_state()` of an equal policy. Raises ValueError for tensors that do not
        fit."""
        if self.policy is not None:
            self.policy.load(weights, optimizer)
        elif self.model is not None:
            with torch.no_grad():
                for name, parameter in named_weights(self.model).items():
                    parameter.copy_(weights[name])

    # --- one step --------------------------------------------------------------------------------------------------

    def _prepare(self, objective: Objective, step: int, batches: list[Batch]) -> list[Update]:
        """All that the losses want from before the step's first update."""
        packs = self.paced([self.packs(batch) for batch in batches])
        with_values = objective.value_loss is not None
        values = [
            self.values(batch, micro) if with_values else None for batch, micro in zip(batches, packs, strict=True)
        ]
        targets = [objective.prepare(batch, step, start) for batch, start in zip(batches, values, strict=True)]
        counts = self.ranks.sum(np.array([target.counts for target in targets]), self.device)
        old: list[list[Tensor]] = [[] for _ in batches]
        if objective.recompute_old:  # the first update starts from the policy itself
            old[1:] = [[self._old_logprobs(micro_batch) for micro_batch in update] for update in packs[1:]]
        return [Update(*parts) for parts in zip(batches, packs, targets, counts, old, strict=True)]

    def _rates(self, objective: Objective, step: int) -> dict[str, float]:
        """The learning rate of each model that the step trains. Warm-up counts the steps that a model is trained in."""
        rates = {}
        if self.policy is not None and objective.policy_loss is not None:
            rates["policy"] = self.policy.rate(step - self.pretraining.steps)
        if self.critic is not None and objective.value_loss is not None:
            rates["critic"] = self.critic.rate(step)
        return rates

    def _train(
        self, objective: Objective, update: Update, rates: dict[str, float], where: str, totals: Totals
    ) -> dict[str, tuple[float, float]]:
        """One update of each model that has a rate; its loss and its gradient's norm. All gradients are checked before the
        first weight changes."""
        losses = {"policy": self._policy_losses, "critic": self._value_losses}
        trained = {"policy": self.policy, "critic": self.critic}
        chosen = {name: model for name, model in trained.items() if model is not None and name in rates}
        count = len(update.packs)
        found = {name: model.gradient(losses[name](objective, update, totals), count) for name, model in chosen.items()}
        checked = {name: (found[name], model.norm(found[name], where)) for name, model in chosen.items()}
        for name, model in chosen.items():
            model.step(rates[name], checked[name][1])
        return checked

    def _policy_losses(self, objective: Objective, update: Update, totals: Totals) -> Iterator[Tensor]:
        if objective.policy_loss is None:
            return
        for index, micro_batch in enumerate(update.packs):
            logp, entropy = self._logprobs(micro_batch)
            start = update.old[index] if update.old else None
            loss, sums = objective.policy_loss(micro_batch, update.targets, logp, start, counts=update.counts)
            yield loss
            carried = torch.from_numpy(update.targets.mask[micro_batch.tokens]).to(self.device)
            totals.add({**sums, "entropy": torch.where(carried, entropy, 0.0).sum()})

    def _value_losses(self, objective: Objective, update: Update, totals: Totals) -> Iterator[Tensor]:
        if objective.value_loss is None or self.critic is None:
            return
        for micro_batch in update.packs:
            values = self.critic.call(token_values, micro_batch)
            loss, sums = objective.value_loss(micro_batch, update.targets, values, counts=update.counts)
            yield loss
            totals.add(sums)

    # --- what the models say ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def values(self, batch: Batch, packs: list[Pack]) -> np.ndarray:
        """The critic's values of the batch's tokens, float32 [N]."""
        values = np.zeros(len(batch.tokens), np.float32)
        for micro_batch in packs:
            if self.critic is not None:
                values[micro_batch.tokens] = self.critic.call(token_values, micro_batch).cpu().numpy()
        return values

    def packs(self, batch: Batch) -> list[Pack]:
        """The micro-batches of a batch."""
        return pack(batch, token_budget=self.settings.token_budget, device=self.device)

    def paced(self, packs: list[list[Pack]]) -> list[list[Pack]]:
        """The micro-batches of several batches, and behind them as many without any token as the ranks need to keep in step.
        All ranks call this for equally many batches."""
        if not any(model.in_step for model in (self.policy, self.critic) if model is not None):
            return packs
        counts = np.array([len(own) for own in packs])
        missing = self.ranks.maximum(counts, self.device).astype(int) - counts
        return [[*own, *[idle_pack(self.device)] * lack] for own, lack in zip(packs, missing.tolist(), strict=True)]

    def _logprobs(self, micro_batch: Pack) -> tuple[Tensor, Tensor]:
        """(logp, entropy) [T] of the pack's tokens."""
        if self.policy is None:
            raise ValueError(
                "learner: this objective does not train the policy, so it is asked for no log-probabilities"
            )
        return self.policy.call(_pack_logprobs, micro_batch, self.temperature)

    @torch.no_grad()
    def _old_logprobs(self, micro_batch: Pack) -> Tensor:
        """By the same packing as in training, so that only a change of weights can make the ratio differ from 1."""
        return self._logprobs(micro_batch)[0]

    # --- figures ---------------------------------------------------------------------------------------------------

    def _metrics(self, objective: Objective, totals: Totals) -> dict[str, float]:
        sums = totals.split(self.ranks.sum(totals.flat(), self.device))
        one = {name: float(values[0]) for name, values in sums.items()}
        tokens, responses = max(one["loss_tokens"], 1.0), max(one["responses"], 1.0)
        entropy = {"entropy": one["entropy"] / tokens} if objective.policy_loss is not None else {}
        return {
            **entropy,
            "masked_fraction": 1 - one["loss_tokens"] / max(one["tokens"], 1.0),
            "length_mean": one["tokens"] / responses,
            "reward_mean": one["reward"] / responses,
            "accuracy": one["correct"] / responses,
            "trained_tokens": one["loss_tokens"],
            "prompt_tokens_saved": 1 - one["inputs"] / max(one["inputs_unshared"], 1.0),
            **objective.metrics(sums, tokens),
        }


_NAMES = {
    "policy": ("loss", "grad_norm", "lr"),
    "critic": ("value_loss", "critic_grad_norm", "critic_lr"),
}
"""Metrics of each model that is trained: its loss, its gradient's norm, its learning rate."""
_SUMS = dict.fromkeys(
    ("entropy", "loss_tokens", "tokens", "responses", "reward", "correct", "inputs", "inputs_unshared"), 1
)


def _pack_logprobs(model: PreTrainedModel, micro_batch: Pack, temperature: float) -> tuple[Tensor, Tensor]:
    hidden = hidden_states(model, micro_batch.ids, micro_batch.positions, micro_batch.attention)
    states = hidden.index_select(0, micro_batch.predictors)
    return token_logprobs(states, output_weight(model), micro_batch.targets, temperature=temperature)


def _batch_sums(batch: Batch, targets: Targets, packs: list[Pack]) -> dict[str, np.ndarray]:
    responses, tokens = len(batch.lengths), len(batch.tokens)
    sums = {
        "loss_tokens": targets.mask.sum(),
        "tokens": tokens,
        "responses": responses,
        "reward": batch.rewards.sum(dtype=np.float64),
        "correct": batch.correct.sum(),
        "inputs": sum(len(micro_batch.ids) for micro_batch in packs if len(micro_batch.tokens)),
        "inputs_unshared": (batch.prompt_lengths * batch.sizes).sum() + tokens - responses,
    }
    return {name: np.array([value], dtype=np.float64) for name, value in sums.items()}


def _mean(pairs: list[tuple[float, float]], index: int) -> float:
    return sum(pair[index] for pair in pairs) / len(pairs) if pairs else 0.0
