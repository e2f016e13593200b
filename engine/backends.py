"""Which form of a trained model `learner.backend` names, and what the form asks of those who load the model."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.config import CriticConfig, DeepSpeedBackend, LearnerConfig, TorchBackend
from engine.critic import HEAD
from engine.devices import resolve_device
from engine.learn_deepspeed_start import installed_version, set_environment
from engine.models import DTYPES
from engine.trained_model import Ranks, TrainedModel
from engine.trained_torch import TorchModel


def make_trained_model(
    name: str,
    model: PreTrainedModel,
    settings: LearnerConfig | CriticConfig,
    *,
    learner: LearnerConfig,
    ranks: Ranks,
) -> TrainedModel:
    """`model` with the rates of `settings`, in the form of `learner.backend`. Raises `ConfigError` where that is missing, of a
    version that is not supported, or does not fit the model."""
    bucket_bytes, layers = learner.bucket_mb << 20, learner.gradient_checkpointing
    if isinstance(learner.backend, TorchBackend):
        return TorchModel(name, model, settings, ranks=ranks, bucket_bytes=bucket_bytes, gradient_checkpointing=layers)
    device = resolve_device(learner.device)
    installed_version()
    set_environment(device)
    from engine.learn_deepspeed import DeepSpeedModel  # a heavy package, and an extra

    output = model.get_output_embeddings()
    return DeepSpeedModel(
        name,
        model,
        settings,
        backend=learner.backend,
        outside=[output.weight] if output is not None else list(model.get_submodule(HEAD).parameters()),
        dtype=DTYPES[learner.dtype],
        device=device,
        ranks=ranks,
        bucket_bytes=bucket_bytes,
        gradient_checkpointing=layers,
    )


def versions(learner: LearnerConfig) -> dict[str, str]:
    """What ranks that train together must have in common. Raises `ConfigError` where the backend is missing or of a version
    that is not supported."""
    found = {"torch": str(torch.__version__), "dtype": learner.dtype, "backend": learner.backend.__struct_config__.tag}
    if isinstance(learner.backend, DeepSpeedBackend):
        found |= {"DeepSpeed": installed_version(), "zero": learner.backend.zero}
    return {name: str(value) for name, value in found.items()}


def load_place(learner: LearnerConfig, device: str) -> str:
    """Where a model is to be read: a rank that keeps a part takes it from the host's memory."""
    return "cpu" if isinstance(learner.backend, DeepSpeedBackend) else device


def reads_weights(learner: LearnerConfig, rank: int) -> bool:
    """Whether this rank reads a model's weights. With DeepSpeed the first one does, and sends every other rank its part, one
    tensor after another."""
    return rank == 0 or isinstance(learner.backend, TorchBackend)
