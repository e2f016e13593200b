"""The learner in plain PyTorch: one process per rank, every rank with the whole model.

One rollout step is one or more updates. Each update's gradient is that of one loss over all of its tokens, whatever their
split: micro-batches of packed rows add to it one after another, ranks are summed at the end, and the denominators were
counted over all ranks before. A rank without data in an update still takes part in its collectives.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.config import Config
from engine.host_memory import return_freed_tensors
from engine.logprobs import token_logprobs
from engine.models import hidden_states, named_weights, output_weight
from engine.objectives import Targets, make_objective
from engine.optimizer import Optimizer
from engine.packing import Pack, pack
from protocols.messages import Batch

LARGE_MODEL = 32_000_000
"""Parameters from which on a CPU learner's memory counts for more than the time that fresh pages cost."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the weights are still those before the update."""


class TorchLearner:
    """Trains `model` in place. `rank`, `world` and `process_group` (None: the default group) place this process."""

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        *,
        rank: int = 0,
        world: int = 1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.settings, self.model, self.rank, self.world, self.group = config.learner, model, rank, world, process_group
        self.device = output_weight(model).device
        # Rollouts carry log-probabilities of the temperature-scaled softmax; the same distribution is trained.
        self.temperature = config.generator.sampling.temperature if config.generator else 1.0
        self.objective = make_objective(config)
        if self.settings.gradient_checkpointing:
            _checkpoint_layers(model)
        if self.device.type == "cpu" and model.num_parameters() >= LARGE_MODEL:
            return_freed_tensors()
        self.optimizer = Optimizer(
            named_weights(model),
            lr=self.settings.lr,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )

    def step(self, step: int, updates: list[Batch]) -> dict[str, float]:
        """Train rollout step `step` (from 1) on this rank's share of each of its updates; the step's metrics, the same on
        every rank. Raises `NonFiniteError` before anything not finite reaches the weights."""
        targets = [self.objective.prepare(batch, step) for batch in updates]
        packs = [pack(batch, token_budget=self.settings.token_budget, device=self.device) for batch in updates]
        counts = self._sum(np.array([target.count for target in targets]))
        totals = _Totals({**_SUMS, **self.objective.sums}, self.device)
        old: list[list[Tensor]] = [[] for _ in updates]
        if self.objective.recompute_old:  # the first update starts from the policy itself
            old[1:] = [[self._old_logprobs(pack) for pack in update] for update in packs[1:]]
        lr = self.settings.lr * min(1.0, step / max(1, self.settings.warmup_steps))
        losses, norms = [], []
        for index, batch in enumerate(updates):
            totals.add(_batch_sums(batch, targets[index], packs[index]))
            totals.add(targets[index].sums)
            if counts[index] == 0:
                continue  # every token of the update is masked, on every rank: there is nothing to learn from
            loss = self._backward(packs[index], targets[index], old[index], float(counts[index]), totals)
            norm = self._check(loss, f"step {step}, update {index + 1} of {len(updates)}")
            self.optimizer.step(lr, norm=norm, clip=self.settings.grad_clip)
            losses.append(loss)
            norms.append(norm)
        trained = {"loss": _mean(losses), "grad_norm": _mean(norms), "lr": lr, "updates": float(len(losses))}
        return trained | self._metrics(totals)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's live tensors by name, for a checkpoint; see `Optimizer.state`."""
        return self.optimizer.state()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Continue from `optimizer_state()` of an equal model. Raises ValueError for tensors that do not fit."""
        self.optimizer.load_state(state)

    # --- one update ------------------------------------------------------------------------------------------------

    def _backward(
        self, packs: list[Pack], targets: Targets, old: list[Tensor], denominator: float, totals: _Totals
    ) -> float:
        """The gradient and the loss of one update, over all ranks."""
        self.optimizer.gradient.zero_()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, micro_batch in enumerate(packs):
            logp, entropy = self._logprobs(micro_batch)
            start = old[index] if old else None
            loss, sums = self.objective.loss(micro_batch, targets, logp, start, denominator=denominator)
            loss.backward()
            total += loss.detach()
            carried = torch.from_numpy(targets.mask[micro_batch.tokens]).to(self.device)
            totals.add({**sums, "entropy": torch.where(carried, entropy, 0.0).sum()})
        if self.world > 1:
            self.optimizer.sum_over_ranks(self.group, self.settings.bucket_mb << 20)
        return float(self._sum(np.array([total.item()]))[0])

    def _logprobs(self, micro_batch: Pack) -> tuple[Tensor, Tensor]:
        """(logp, entropy) [T] of the pack's tokens."""
        hidden = hidden_states(self.model, micro_batch.ids, micro_batch.positions, micro_batch.attention)
        states = hidden.index_select(0, micro_batch.predictors)
        return token_logprobs(states, output_weight(self.model), micro_batch.targets, temperature=self.temperature)

    @torch.no_grad()
    def _old_logprobs(self, micro_batch: Pack) -> Tensor:
        """By the same packing as in training, so that only a change of weights can make the ratio differ from 1."""
        return self._logprobs(micro_batch)[0]

    def _check(self, loss: float, where: str) -> float:
        """The gradient's global norm, when it and the loss are finite."""
        norm = self.optimizer.norm()
        if math.isfinite(loss) and math.isfinite(norm):
            return norm
        bad = self.optimizer.non_finite()
        what = f"the gradient of {len(bad)} weights, the first is {bad[0]}" if bad else "the gradient's norm"
        if not math.isfinite(loss):
            what = f"the loss ({loss}) and {what}"
        raise NonFiniteError(f"learner rank {self.rank}: {where}: not finite: {what}; the weights are unchanged")

    # --- over ranks ------------------------------------------------------------------------------------------------

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """Element-wise sum over the ranks, in fp64."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values.astype(np.float64)).to(self.device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.cpu().numpy()

    def _metrics(self, totals: _Totals) -> dict[str, float]:
        sums = totals.split(self._sum(totals.flat()))
        one = {name: float(values[0]) for name, values in sums.items()}
        tokens, responses = max(one["loss_tokens"], 1.0), max(one["responses"], 1.0)
        return {
            "entropy": one["entropy"] / tokens,
            "masked_fraction": 1 - one["loss_tokens"] / max(one["tokens"], 1.0),
            "length_mean": one["tokens"] / responses,
            "reward_mean": one["reward"] / responses,
            "accuracy": one["correct"] / responses,
            "trained_tokens": one["loss_tokens"],
            "prompt_tokens_saved": 1 - one["inputs"] / max(one["inputs_unshared"], 1.0),
            **self.objective.metrics(sums, tokens),
        }


_SUMS = dict.fromkeys(
    ("entropy", "loss_tokens", "tokens", "responses", "reward", "correct", "inputs", "inputs_unshared"), 1
)


def _batch_sums(batch: Batch, targets: Targets, packs: list[Pack]) -> dict[str, np.ndarray]:
    responses, tokens = len(batch.lengths), len(batch.tokens)
    sums = {
        "loss_tokens": targets.mask.sum(),
        "tokens": tokens,
        "responses": responses,
        "reward": batch.rewards.sum(dtype=np.float64),
        "correct": batch.correct.sum(),
        "inputs": sum(len(micro_batch.ids) for micro_batch in packs),
        "inputs_unshared": (batch.prompt_lengths * batch.sizes).sum() + tokens - responses,
    }
    return {name: np.array([value], dtype=np.float64) for name, value in sums.items()}


class _Totals:
    """Vectors that add up over micro-batches, updates and ranks, in fp64 on the device (no waiting for it while training)."""

    def __init__(self, lengths: dict[str, int], device: torch.device) -> None:
        self.vectors = {name: torch.zeros(n, dtype=torch.float64, device=device) for name, n in lengths.items()}

    def add(self, sums: dict[str, Tensor] | dict[str, np.ndarray]) -> None:
        for name, values in sums.items():
            self.vectors[name] += torch.as_tensor(values, device=self.vectors[name].device)

    def flat(self) -> np.ndarray:
        return torch.cat(list(self.vectors.values())).cpu().numpy()

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([len(vector) for vector in self.vectors.values()])
        return dict(zip(self.vectors, np.split(flat, ends[:-1]), strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass. Layers do so in training mode alone, which is set for them and
    not for what is inside, where it would switch dropout on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
