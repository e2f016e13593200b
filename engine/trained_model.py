"""A model that is trained: its optimizer, and one gradient after another, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.config import CriticConfig, LearnerConfig
from engine.models import named_weights
from engine.optimizer import Optimizer


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the weights are still those before the update."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; `group` None is the default group."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """Element-wise sum over the ranks, in fp64; the same on every rank."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values.astype(np.float64)).to(device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.cpu().numpy()


class TrainedModel:
    """`model` in place, with the rates of `settings`; `name` is the model's in errors. `bucket_bytes` bounds the transport's
    buffers."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        settings: LearnerConfig | CriticConfig,
        *,
        ranks: Ranks,
        bucket_bytes: int,
        gradient_checkpointing: bool,
    ) -> None:
        self.name, self.model, self.settings, self.ranks, self.bucket_bytes = name, model, settings, ranks, bucket_bytes
        self.device = next(model.parameters()).device
        if gradient_checkpointing and isinstance(model, PreTrainedModel):
            _checkpoint_layers(model)
        self.optimizer = Optimizer(
            named_weights(model), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def rate(self, step: int) -> float:
        """The learning rate of the `step`-th step (from 1) that trains this model: up during the warm-up, then as it is or, with
        `decay_steps`, down. That many steps have a rate above 0."""
        settings = self.settings
        share = min(1.0, step / max(1, settings.warmup_steps))
        if isinstance(settings, LearnerConfig) and settings.decay_steps:
            left, all_down = (settings.decay_steps + 1 - since for since in (step, settings.warmup_steps))
            share = min(share, max(0.0, left / max(1, all_down)))
        return settings.lr * share

    def gradient(self, losses: Iterable[Tensor]) -> float:
        """Collects the gradient of an update, over all ranks; the loss. `losses` are those of its micro-batches, made one
        after another."""
        self.optimizer.gradient.zero_()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for loss in losses:
            loss.backward()
            total += loss.detach()
        if self.ranks.world > 1:
            self.optimizer.sum_over_ranks(self.ranks.group, self.bucket_bytes)
        return float(self.ranks.sum(np.array([total.item()]), self.device)[0])

    def norm(self, loss: float, where: str) -> float:
        """The gradient's global norm. Raises `NonFiniteError` when it or the loss is not finite."""
        norm = self.optimizer.norm()
        if math.isfinite(loss) and math.isfinite(norm):
            return norm
        bad = self.optimizer.non_finite()
        what = f"the gradient of {len(bad)} weights, the first is {bad[0]}" if bad else "the gradient's norm"
        if not math.isfinite(loss):
            what = f"the loss ({loss}) and {what}"
        raise NonFiniteError(
            f"learner rank {self.ranks.rank}: {where}: {self.name}: not finite: {what}; the weights are unchanged"
        )

    def step(self, rate: float, norm: float) -> None:
        """Takes the step of the gradient, whose norm this is."""
        self.optimizer.step(rate, norm=norm, clip=self.settings.grad_clip)


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass. Layers do so in training mode alone, which is set for them and
    not for what is inside, where it would switch dropout on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
