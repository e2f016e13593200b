"""A model that is trained, one update after another, over all ranks: what every form of the learner's backend can do.

`engine.trained_torch` keeps the whole model on every rank, `engine.learn_deepspeed` parts of it. The learner sees neither.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.config import CriticConfig, LearnerConfig
from engine.gathered import Gathered

T = TypeVar("T")

TEXT_BYTES = 512
"""Of a text that ranks tell each other."""


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
        return self._reduce(values, device, dist.ReduceOp.SUM)

    def maximum(self, values: np.ndarray, device: torch.device) -> np.ndarray:
        """Element-wise maximum over the ranks, in fp64; the same on every rank."""
        return self._reduce(values, device, dist.ReduceOp.MAX)

    def _reduce(self, values: np.ndarray, device: torch.device, operation: Any) -> np.ndarray:
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values.astype(np.float64)).to(device)
        dist.all_reduce(tensor, operation, group=self.group)
        return tensor.cpu().numpy()

    def texts(self, own: str, device: torch.device | str) -> list[str]:
        """What each rank says, in the order of the ranks: the first `TEXT_BYTES` bytes of it."""
        if self.world == 1:
            return [own]
        said = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        text = own.encode()[:TEXT_BYTES]
        said[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else said[:0]
        everywhere = [torch.zeros(TEXT_BYTES, dtype=torch.uint8, device=device) for _ in range(self.world)]
        dist.all_gather(everywhere, said.to(device), group=self.group)
        return [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in everywhere]


class TrainedModel(ABC):
    """`model` with the rates of `settings`; `name` is the model's in errors."""

    in_step = False
    """Whether the ranks must make the same calls of the model in the same order, with data or without."""

    def __init__(self, name: str, model: nn.Module, settings: LearnerConfig | CriticConfig, *, ranks: Ranks) -> None:
        self.name, self.model, self.settings, self.ranks = name, model, settings, ranks
        self.device = next(model.parameters()).device

    def rate(self, step: int) -> float:
        """The learning rate of the `step`-th step (from 1) that trains this model: up during the warm-up, then as it is or, with
        `decay_steps`, down. That many steps have a rate above 0."""
        settings = self.settings
        share = min(1.0, step / max(1, settings.warmup_steps))
        if isinstance(settings, LearnerConfig) and settings.decay_steps:
            left, all_down = (settings.decay_steps + 1 - since for since in (step, settings.warmup_steps))
            share = min(share, max(0.0, left / max(1, all_down)))
        return settings.lr * share

    def gradient(self, losses: Iterable[Tensor], count: int) -> float:
        """Collects the gradient of an update, over all ranks; the loss. `losses` are those of its `count` micro-batches, each
        made once the one before is done with: an iterator, so that one micro-batch at a time is in memory."""
        self._start_gradient()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, loss in enumerate(losses):
            self._backward(loss, last=index == count - 1)
            total += loss.detach()
        self._finish_gradient()
        return float(self.ranks.sum(np.array([total.item()]), self.device)[0])

    def norm(self, loss: float, where: str) -> float:
        """The gradient's global norm. Raises `NonFiniteError` when it or the loss is not finite."""
        norm = self._norm()
        if math.isfinite(loss) and math.isfinite(norm):
            return norm
        bad = [name for name, gradient in self.gradients() if not bool(torch.isfinite(gradient).all())]
        what = f"the gradient of {len(bad)} weights, the first is {bad[0]}" if bad else "the gradient's norm"
        if not math.isfinite(loss):
            what = f"the loss ({loss}) and {what}"
        raise NonFiniteError(
            f"learner rank {self.ranks.rank}: {where}: {self.name}: not finite: {what}; the weights are unchanged"
        )

    # --- what a form brings --------------------------------------------------------------------------------------------

    @abstractmethod
    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """`function(model, *arguments)`, with the weights that it uses in place."""

    @abstractmethod
    def _start_gradient(self) -> None:
        """An update begins."""

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of one micro-batch; `last` of its update."""

    @abstractmethod
    def _finish_gradient(self) -> None:
        """The gradient is complete on this rank; afterwards it is that over all ranks."""

    @abstractmethod
    def _norm(self) -> float:
        """The gradient's global norm; not finite when one of its entries is not."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The whole gradient of each weight, between `gradient` and `step`. All ranks go through it."""

    @abstractmethod
    def step(self, rate: float, norm: float) -> None:
        """Takes the step of the gradient, whose norm this is."""

    @abstractmethod
    def weights(self) -> Gathered:
        """The model's weights by Hugging Face name, sorted."""

    @abstractmethod
    def optimizer_state(self) -> Gathered:
        """`step`, and by the weights' names `exp_avg.NAME`, `exp_avg_sq.NAME` and, in bfloat16, `master.NAME`: the same for
        every form, so that what one has saved another continues, on any number of ranks."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Continues from `weights()` and `optimizer_state()` of an equal model. Every rank gets all of them. Raises
        ValueError for tensors of the optimizer that do not fit."""


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass. Layers do so in training mode alone, which is set for them and
    not for what is inside, where it would switch dropout on."""
    if not isinstance(model, PreTrainedModel):
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
