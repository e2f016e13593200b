"""The sharded form of a model that is trained: an engine of DeepSpeed's, with ZeRO stage 1, 2 or 3.

This is the one file that imports DeepSpeed; `engine.learn_deepspeed_start` looks first whether it is there. What is whole at
some time is one bucket of the weights, or one tensor of the optimizer. Checkpoints hold whole tensors by the weights'
names, written one after another, so they fit any stage, any number of ranks, and the plain form as well (DeepSpeed's own
files do not, and are pickled).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from engine.config import ConfigError, CriticConfig, DeepSpeedBackend, LearnerConfig
from engine.gathered import Gathered
from engine.models import named_weights
from engine.optimizer import check_state
from engine.trained_model import Ranks, TrainedModel, checkpoint_layers

T = TypeVar("T")

MOMENTS = ("exp_avg", "exp_avg_sq")
NEVER = 1 << 60

logger.setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls, at every one
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does its work; this one would be compiled first


class DeepSpeedModel(TrainedModel):
    """Trains `model` in an engine of its own on `device`. `outside` are weights that are used beyond the forward pass of the
    module that has them, as an output layer's is. `bucket_bytes` bounds what is reduced and gathered at a time."""

    in_step = True

    def __init__(
        self,
        name: str,
        model: nn.Module,
        settings: LearnerConfig | CriticConfig,
        *,
        backend: DeepSpeedBackend,
        outside: Sequence[Tensor],
        dtype: torch.dtype,
        device: str,
        ranks: Ranks,
        bucket_bytes: int,
        gradient_checkpointing: bool,
    ) -> None:
        """Raises `ConfigError` for weights of another type than `dtype`, and a device that is not DeepSpeed's."""
        super().__init__(name, model, settings, ranks=ranks)
        self.stage, self.bucket_bytes = backend.zero, bucket_bytes
        self.like = {own: torch.empty_like(weight, device="meta") for own, weight in named_weights(model).items()}
        _check(name, self.like, dtype, device)
        if gradient_checkpointing:
            checkpoint_layers(model)
        if not dist.is_initialized():
            dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1)
        caller = _Caller(model)
        adamw = torch.optim.AdamW(
            named_weights(model).values(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        options = _options(settings, backend, dtype=dtype, bucket_bytes=bucket_bytes, pinned=device != "cpu")
        self.engine: Any = deepspeed.initialize(model=caller, optimizer=adamw, config=options)[0]
        self.device = torch.device(self.engine.device)
        self.zero: Any = self.engine.optimizer
        if self.stage == 3:
            for weight in outside:
                deepspeed.zero.register_external_parameter(caller, weight)
        self._start_moments()

    # --- one update ----------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        result: T = self.engine(function, *arguments)
        return result

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in named_weights(self.model).items():
            yield name, safe_get_full_grad(weight)

    def step(self, rate: float, norm: float) -> None:
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.engine.step()

    def _start_gradient(self) -> None:
        pass  # the engine's step has cleared it

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.world)  # it takes the mean over the ranks

    def _finish_gradient(self) -> None:
        pass  # summed in the last micro-batch's backward pass

    def _norm(self) -> float:
        if isinstance(self.zero, DeepSpeedZeroOptimizer_Stage3):
            return float(combine_grad_norm_groups(self.zero._get_norm_groups()))
        if isinstance(self.zero, BF16_Optimizer):
            norm = float(get_global_norm_of_tensors(self.zero.get_grads_for_norm()[0], norm_type=2))
            return norm if norm >= 0 else float("inf")
        return float(self.zero.scaled_global_norm())

    # --- whole tensors -------------------------------------------------------------------------------------------------

    def weights(self) -> Gathered:
        return Gathered(self.like, self._weights, parts=self.stage == 3)

    def optimizer_state(self) -> Gathered:
        like = {"step": torch.empty((), device="meta")}
        for name in self.like:
            like |= {key: torch.empty(self.like[name].shape, device="meta") for key in self._keys(name)}
        return Gathered(like, self._optimizer_state, parts=True)

    def load(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        check_state(self.optimizer_state().like, optimizer)
        for name, weight in named_weights(self.model).items():
            value = weights[name].to(self.device)
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=self.stage == 3), torch.no_grad():
                weight.copy_(value)
            for key in self._keys(name):
                self._set(weight, optimizer[key], key.removesuffix(f".{name}"))
            if f"master.{name}" not in optimizer:
                self._set(weight, value, "master")
        for flat in self._flats():
            self.zero.optimizer.state[flat]["step"].copy_(optimizer["step"])

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in self._buckets():
            with deepspeed.zero.GatheredParameters(list(bucket.values()), enabled=self.stage == 3):
                for name, weight in bucket.items():
                    yield name, weight.data

    def _buckets(self) -> Iterator[dict[str, Tensor]]:
        bucket: dict[str, Tensor] = {}
        size = 0
        for name, weight in named_weights(self.model).items():
            own = self.like[name].numel() * weight.element_size()
            if bucket and size + own > self.bucket_bytes:
                yield bucket
                bucket, size = {}, 0
            bucket[name] = weight
            size += own
        yield bucket

    def _keys(self, name: str) -> list[str]:
        masters = ("master",) if self.like[name].dtype != torch.float32 else ()
        return [f"{key}.{name}" for key in (*MOMENTS, *masters)]

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        yield "step", self.zero.optimizer.state[self._flats()[0]]["step"]
        for name, weight in named_weights(self.model).items():
            for key in self._keys(name):
                what = key.removesuffix(f".{name}")
                master = what == "master"
                yield key, safe_get_full_fp32_param(weight) if master else safe_get_full_optimizer_state(weight, what)

    def _set(self, weight: Tensor, value: Tensor, what: str) -> None:
        """Takes this rank's part of a whole fp32 tensor into the master weights or a moment."""
        if self.stage < 3 and what == "master":
            safe_set_full_fp32_param(weight, value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(weight, value, what)
        elif what == "master":
            safe_set_local_fp32_param(weight, self._part(weight, value))
        else:
            safe_set_local_optimizer_state(weight, self._part(weight, value), what)

    def _part(self, weight: Any, value: Tensor) -> Tensor:
        """What of a tensor lies on this rank, with zeros behind its end."""
        size, flat = weight.ds_tensor.numel(), value.flatten()
        own = flat[self.ranks.rank * size : (self.ranks.rank + 1) * size]
        return nn.functional.pad(own, (0, size - own.numel()))

    def _flats(self) -> list[Tensor]:
        """The fp32 vectors that this rank's optimizer steps."""
        zero = self.zero
        if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
            return list(zero.fp32_partitioned_groups_flat)
        return list(
            zero.fp32_groups_flat_partition
            if isinstance(zero, BF16_Optimizer)
            else zero.single_partition_of_fp32_groups
        )

    def _start_moments(self) -> None:
        """Now, so that a checkpoint of any moment has them all, and can be loaded before the first step."""
        for flat in self._flats():
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.zero.optimizer.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        if not isinstance(self.zero, DeepSpeedZeroOptimizer_Stage3):
            self.zero._lazy_init_hp_params_optimizer_state()


class _Caller(nn.Module):
    """Its forward pass calls a function on the model, so that the engine sees every use of the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # the engine must not switch on what the model has switched off

    def forward(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(self.model, *arguments)


def _options(
    settings: LearnerConfig | CriticConfig,
    backend: DeepSpeedBackend,
    *,
    dtype: torch.dtype,
    bucket_bytes: int,
    pinned: bool,
) -> dict[str, Any]:
    """DeepSpeed's config. Micro-batches are counted by us; gradients are summed and kept in fp32, as in the plain form."""
    zero: dict[str, Any] = {
        "stage": backend.zero,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket_bytes // 4,
        "allgather_bucket_size": bucket_bytes // 4,
    }
    if backend.zero == 3:
        zero["stage3_param_persistence_threshold"] = backend.whole_below
        zero["stage3_prefetch_bucket_size"] = bucket_bytes // 4
    if backend.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "steps_per_print": NEVER,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # theirs is compiled on its first use
    }


def _check(name: str, weights: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> None:
    for own, weight in weights.items():
        if weight.dtype != dtype:
            raise ConfigError(f"{name}: {own} is {weight.dtype}, learner.dtype says {dtype}: expected one type")
    theirs = get_accelerator().device_name()
    if device.partition(":")[0] != theirs:
        raise ConfigError(
            f"learner.device: got {device!r}, DeepSpeed works on {theirs!r} (DS_ACCELERATOR); expected one device"
        )
