"""New weights into a model that is in use: all or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models import named_weights


class WeightsRefused(ValueError):
    """Weights that do not fit the model; says which names or shapes. The model is unchanged."""


def adopt_weights(model: PreTrainedModel, weights: Mapping[str, Tensor], version: int) -> None:
    """Copy `weights`, by the names of `named_weights`, into the model's own parameters, whose type and device stay.

    Raises `WeightsRefused` before the first copy unless names and shapes are exactly the model's.
    """
    parameters = named_weights(model)
    check_weights(parameters, weights, version)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def check_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], version: int) -> None:
    """Raises `WeightsRefused` unless `weights` have exactly the names and shapes of `parameters`."""
    missing, unknown = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    wrong = [
        f"{name} {list(weights[name].shape)} (expected {list(parameter.shape)})"
        for name, parameter in parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    faults = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in [("missing", missing), ("unknown", unknown), ("of the wrong shape", wrong)]
        if names
    ]
    if faults:
        raise WeightsRefused(f"weights of version {version}, {len(weights)} tensors: {'; '.join(faults)}")
