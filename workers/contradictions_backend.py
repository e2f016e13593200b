"""What cannot be right about the learner's backend. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import CollectObjective, Config, ConfigError, DeepSpeedBackend, LearnerConfig
from engine.learn_deepspeed_start import installed_version


def backend(config: Config) -> Iterator[str]:
    """Contradictions of `learner.backend`."""
    found = config.learner.backend
    if not isinstance(found, DeepSpeedBackend):
        return
    if found.whole_below < 0:
        yield f"learner.backend.whole_below: got {found.whole_below}, expected at least 0"
    if isinstance(config.objective, CollectObjective):
        yield 'objective.type = "collect" trains nothing: got learner.backend.type = "deepspeed", expected "torch"'
    if config.reads_pages:
        yield 'learner.backend.type: got "deepspeed", expected "torch" for UTel'


def missing_backend(config: Config) -> str | None:
    """Why the backend cannot be had on this machine; None when it can."""
    try:
        if isinstance(config.learner.backend, DeepSpeedBackend):
            installed_version()
    except ConfigError as error:
        return str(error)
    return None


def sharing(learner: LearnerConfig) -> str:
    """What of a model each rank keeps, in words."""
    found = learner.backend
    if not isinstance(found, DeepSpeedBackend):
        return "torch: every rank has the whole model, its gradient and its optimizer"
    shared = ", ".join(["optimizer", "gradient", "weights"][: found.zero])
    return f"DeepSpeed, ZeRO stage {found.zero}: {shared} shared out" + (
        "; the optimizer in the host's memory" if found.offload else ""
    )
