"""AdamW over a model's parameters, with one flat fp32 gradient.

All gradients are views of one vector: clearing, summing over ranks, the norm and clipping are single operations, and a
parameter that a rank's share does not touch takes part with zeros.

A bfloat16 model keeps fp32 master weights here: gradients of micro-batches are added up in fp32, the step is taken on the
masters, and the model gets them rounded. (Steps of lr 1e-6 would be lost in bfloat16's 8 bits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

NORM_ROW = 1 << 10


class Optimizer:
    """`weights` are the parameters by name; `gradient` [all elements] fp32 collects what `backward` yields."""

    def __init__(
        self, weights: dict[str, Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.weights = weights
        self.masters = {name: _master(weight) for name, weight in weights.items()}
        device = next(iter(weights.values())).device
        self.gradient = torch.zeros(sum(w.numel() for w in weights.values()), dtype=torch.float32, device=device)
        self.views = self._lend_gradient()
        self.adamw = torch.optim.AdamW(self.masters.values(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        for master in self.masters.values():  # now, so that a checkpoint of any moment has it all
            step = torch.zeros((), dtype=torch.float32, device=device)
            moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            self.adamw.state[master] = {"step": step, **moments}

    def sum_over_ranks(self, group: dist.ProcessGroup | None, bucket_bytes: int) -> None:
        """Adds up the ranks' gradients, in buckets that bound the transport's buffers."""
        for bucket in self.gradient.split(max(1, bucket_bytes // 4)):
            dist.all_reduce(bucket, group=group)

    def norm(self) -> float:
        """The gradient's global norm. In rows, which are added up in fp64: one fp32 sum over 10^8 squares comes out more
        than a percent low."""
        whole = self.gradient.numel() // NORM_ROW * NORM_ROW
        rows = torch.linalg.vector_norm(self.gradient[:whole].view(-1, NORM_ROW), dim=1).double()
        return math.hypot(float(rows.norm()), float(self.gradient[whole:].norm()))

    def step(self, lr: float, *, norm: float, clip: float) -> None:
        """One AdamW step at `lr` with the gradient of global norm `norm`, scaled down to norm `clip` (0: never)."""
        if clip and norm > clip:
            self.gradient.mul_(clip / (norm + 1e-6))
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                if self.masters[name] is not weight:
                    weight.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """The live tensors (not copies): `step`, `exp_avg.NAME`, `exp_avg_sq.NAME` and, in bfloat16, `master.NAME`."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            adam = self.adamw.state[master]
            state |= {
                "step": adam["step"],
                f"exp_avg.{name}": adam["exp_avg"],
                f"exp_avg_sq.{name}": adam["exp_avg_sq"],
            }
            if master is not self.weights[name]:
                state[f"master.{name}"] = master.detach()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave, also to the model's weights where there are masters. Raises ValueError for
        tensors that do not fit this model."""
        own = self.state()
        check_state(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        with torch.no_grad():
            for name, master in self.masters.items():
                self.adamw.state[master]["step"].copy_(state["step"])
                if master is not self.weights[name]:
                    self.weights[name].copy_(master)

    def _lend_gradient(self) -> dict[str, Tensor]:
        """Each weight's part of `gradient`, made the place where `backward` (or, with masters, a hook) adds up."""
        views: dict[str, Tensor] = {}
        first = 0
        for name, weight in self.weights.items():
            view = views[name] = self.gradient[first : first + weight.numel()].view(weight.shape)
            first += weight.numel()
            self.masters[name].grad = view
            if self.masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(_collect(view))
        return views


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises ValueError when an optimizer's tensors are not those of a model whose own are `own`."""
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(f"optimizer state: {len(odd)} tensors are missing or unknown, the first is {odd[0]}")
    for name, tensor in own.items():
        if tensor.shape != (found := state[name]).shape:
            got, expected = list(found.shape), list(tensor.shape)
            raise ValueError(f"optimizer state: {name}: got shape {got}, expected {expected}")


def _master(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float32 else weight.detach().float()


def _collect(view: Tensor) -> Callable[[Tensor], None]:
    def collect(weight: Tensor) -> None:
        if weight.grad is not None:
            view.add_(weight.grad)
            weight.grad = None

    return collect
