"""The plain form of a model that is trained: the whole of it, its gradient and its optimizer on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from engine.config import CriticConfig, LearnerConfig
from engine.gathered import Gathered, held
from engine.models import named_weights
from engine.optimizer import Optimizer
from engine.trained_model import Ranks, TrainedModel, checkpoint_layers

T = TypeVar("T")


class TorchModel(TrainedModel):
    """Trains `model` in place. `bucket_bytes` bounds the transport's buffers."""

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
        super().__init__(name, model, settings, ranks=ranks)
        self.bucket_bytes = bucket_bytes
        if gradient_checkpointing:
            checkpoint_layers(model)
        self.optimizer = Optimizer(
            named_weights(model), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(self.model, *arguments)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.optimizer.views.items()

    def step(self, rate: float, norm: float) -> None:
        self.optimizer.step(rate, norm=norm, clip=self.settings.grad_clip)

    def weights(self) -> Gathered:
        return held(named_weights(self.model))

    def optimizer_state(self) -> Gathered:
        return held(self.optimizer.state())

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in named_weights(self.model).items():
                parameter.copy_(weights[name])
        self.optimizer.load_state(optimizer)

    def _start_gradient(self) -> None:
        self.optimizer.gradient.zero_()

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def _finish_gradient(self) -> None:
        if self.ranks.world > 1:
            self.optimizer.sum_over_ranks(self.ranks.group, self.bucket_bytes)

    def _norm(self) -> float:
        return self.optimizer.norm()
