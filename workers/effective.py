"""The effective run, in one unit system: groups, samples, tokens and versions.

A step is a rollout step: it trains one batch of groups in `updates_per_step` updates and publishes one version of the
weights. Token counts are upper bounds, from the longest prompt and the longest response that the config allows.
"""

from __future__ import annotations

from msgspec import Struct

from engine.config import (
    Config,
    CriticConfig,
    DapoObjective,
    LengthAdaptive,
    LogTask,
    PathModel,
    PpoObjective,
    SftObjective,
)
from engine.tasks import named_tasks, page_tasks
from workers import contradictions
from workers.contradictions_backend import sharing
from workers.evaluations import evaluation_steps
from workers.memory import Memory, memory
from workers.model_shape import ModelShape, model_shape, starting_model

LOG_BYTES_PER_TOKEN = 12
"""Token, log-probability, and some four bytes of text."""


class Section(Struct, frozen=True):
    """One part of the effective run, as (name, value) lines."""

    title: str
    lines: list[tuple[str, str]]


def effective(config: Config) -> list[Section]:
    """What the run will do, for a config without contradictions. Memory is left out where the model is not here."""
    if config.reads_pages:
        return [_pages(config), _whole(config)]
    sections = [_run(config), _step(config), _pace(config), _whole(config)]
    if contradictions.missing_model(config) is None:
        sections.append(_memory(memory(config, model_shape(config))))
    return sections


# --- the parts -------------------------------------------------------------------------------------------------------


def _run(config: Config) -> Section:
    model = starting_model(config)
    shape = model_shape(config) if contradictions.missing_model(config) is None else None
    name = model.path if isinstance(model, PathModel) else "new"
    named, logs = named_tasks(config.tasks), [task for task in config.tasks if isinstance(task, LogTask)]
    weights = sum(task.weight for task in logs or named.values())
    tasks = [f"log {task.path} ({task.weight / weights:.0%})" for task in logs]
    tasks += [f"{name} ({'held-out only' if logs else f'{task.weight / weights:.0%}'})" for name, task in named.items()]
    lines = [
        ("name", f"{config.name}, in {config.run_dir}"),
        ("model", name + (_described(shape) if shape else ", not on this machine")),
        ("tasks", ", ".join(tasks)),
        ("objective", str(config.objective.__struct_config__.tag)),
    ]
    if isinstance(config.objective, DapoObjective | PpoObjective):
        lines[-1] = ("objective", _objective(config.objective))
    if isinstance(config.objective, PpoObjective) and config.critic is not None:
        lines.append(("critic", _critic(config.critic)))
    if config.cold_start:
        lines.append(("cold start", config.cold_start))
    return Section("Run", lines)


def _pages(config: Config) -> Section:
    tasks = ", ".join(task.path or f"{task.synthetic:,} synthetic pages" for task in page_tasks(config.tasks))
    step = f"{config.buffer.groups_per_step} pages, {config.learner.updates_per_step} updates, {config.learner.ranks} ranks"
    lines = [
        ("name", f"{config.name}, in {config.run_dir}"),
        ("model", f"UTel, starting from {config.cold_start or getattr(config.model, 'path', None) or 'fresh weights'}"),
        ("pages", tasks),
        ("objective", str(config.objective.__struct_config__.tag)),
        ("a step", f"{step}, micro-batches of at most {config.learner.token_budget:,} sub-tokens"),
    ]
    if config.eval.prompts:
        lines.append(("held out", f"{config.eval.prompts} pages, every {config.eval.every or config.steps} steps"))
    return Section("Run", lines)


def _objective(objective: DapoObjective | PpoObjective) -> str:
    """What is maximised, in one line."""
    parts = [f"clip -{objective.clip_low} / +{objective.clip_high}"]
    parts += [f"dual clip {objective.dual_clip}"] if objective.dual_clip is not None else []
    if isinstance(objective, PpoObjective):
        lam = objective.lam_actor
        actor = f"1 - 1 / ({lam.alpha:g} x length)" if isinstance(lam, LengthAdaptive) else f"{lam:g}"
        parts.append(
            f"GAE with gamma {objective.gamma:g}, lambda {actor} (actor) and {objective.lam_critic:g} (critic)"
        )
        parts += ["advantages whitened"] if objective.whiten else []
        parts += [f"{objective.positive_nll:g} x NLL of right answers"] if objective.positive_nll else []
    parts += [f"mean over {objective.loss}s", f"correction {objective.correction.__struct_config__.tag}"]
    return f"{objective.__struct_config__.tag}: {', '.join(parts)}"


def _critic(critic: CriticConfig) -> str:
    parts = [f"from {critic.path}" if critic.path is not None else "from the policy, with a head of zeros"]
    parts.append(f"learning rate {critic.lr:g}")
    parts += [f"value clip {critic.value_clip:g}"] if critic.value_clip is not None else []
    if critic.pretrain_steps:
        until = ", or until it levels off" if critic.level_off is not None else ""
        parts.append(f"alone in the first {critic.pretrain_steps} steps{until}")
    return ", ".join(parts)


def _step(config: Config) -> Section:
    groups, updates = config.buffer.groups_per_step, config.learner.updates_per_step
    samples, response = _samples(config), _response_tokens(config)
    lines = [("groups", f"{groups:,}"), ("samples", f"{groups:,} x {samples} = {groups * samples:,}")]
    prompts = groups * config.buffer.prompt_tokens
    if response is None:
        lines.append(("tokens", f"at most {prompts:,} of prompts, and the solutions"))
    else:
        lines.append(
            (
                "tokens",
                f"at most {groups * samples * response:,} of responses ({groups * samples:,} x {response:,}) and "
                f"{prompts:,} of prompts ({groups:,} x {config.buffer.prompt_tokens:,}, each computed once)",
            )
        )
    lines += [
        ("versions", "1 published"),
        (
            "updates",
            f"{updates}, each of {_share(groups, updates)} groups = {_share(groups * samples, updates)} samples",
        ),
        ("ranks", f"{config.learner.ranks}, each about {groups / updates / config.learner.ranks:.4g} groups an update"),
        ("backend", sharing(config.learner)),
        ("micro-batches", f"of at most {config.learner.token_budget:,} tokens"),
    ]
    return Section("A step", lines)


def _pace(config: Config) -> Section:
    buffer = config.buffer
    bound = (buffer.max_lag + 1) * buffer.groups_per_step
    samples = _samples(config)
    held = ("in the system", f"at most {bound:,} groups that will be trained = {bound * samples:,} samples")
    if isinstance(config.objective, SftObjective):
        return Section("Pace", [held])
    synchronous = "none: sampling and training take turns"
    bounded = f"at most {buffer.max_lag} versions; older tokens are masked out of the loss"
    lines = [("lag", bounded if buffer.max_lag else synchronous), held]
    if buffer.dynamic_sampling:
        most = int(buffer.max_oversample * bound)
        lines.append(
            (
                "dynamic sampling",
                "groups that are all right or all wrong are dropped and free their place; oversampled by the measured keep "
                f"rate, at most {buffer.max_oversample:g} x = {most:,} groups = {most * samples:,} samples in the system",
            )
            if buffer.max_lag
            else ("dynamic sampling", "groups that are all right or all wrong are dropped and free their place")
        )
    if config.generator is not None:
        slots = config.generator.count * config.generator.engine.slots
        lines.append(
            (
                "generators",
                f"{config.generator.count} x {config.generator.engine.slots} slots = {slots:,} samples at once",
            )
        )
        scorers = config.reward.count * config.reward.scorers
        lines.append(
            ("rewards", f"{config.reward.count} x {config.reward.scorers} scorers = {scorers} samples at once")
        )
    return Section("Pace", lines)


def _whole(config: Config) -> Section:
    steps, updates = config.steps, config.learner.updates_per_step
    groups = steps * config.buffer.groups_per_step
    samples, response = groups * _samples(config), _response_tokens(config)
    warm = config.learner.warmup_steps
    lines = [
        ("steps", f"{steps:,} = {steps * updates:,} updates = {steps:,} versions"),
        ("trained", f"{groups:,} groups = {samples:,} samples"),
        (
            "learning rate",
            f"{config.learner.lr:g}"
            + (f", warm-up over {warm} steps = {warm * updates} updates" if warm else "")
            + (f", 0 after step {down}" if (down := config.learner.decay_steps) else ""),
        ),
        ("checkpoints", f"every {config.learner.checkpoint_every} steps, {config.learner.keep_checkpoints} kept"),
    ]
    if response is not None:
        size = size_text(samples * response * LOG_BYTES_PER_TOKEN)
        lines.append(("log", f"at most about {size} of trained samples; dropped ones are kept too"))
    evaluation = config.eval
    if evaluation.prompts and config.generates:
        when = evaluation_steps(config)
        each = evaluation.prompts * evaluation.samples
        lines.append(
            (
                "evaluations",
                f"{len(when)}, each {evaluation.prompts:,} prompts x {evaluation.samples} = {each:,} samples, "
                f"after step {_enumerate(when)}",
            )
        )
    return Section("The whole run", lines)


def _memory(roles: list[Memory]) -> Section:
    lines = [
        (
            role.name if role.processes == 1 else f"{role.name} (each of {role.processes})",
            f"{size_text(role.bytes)}: " + ", ".join(f"{part} {size_text(size)}" for part, size in role.parts.items()),
        )
        for role in roles
    ]
    total = sum(role.processes * role.bytes for role in roles)
    return Section("Memory, estimated at the longest sequences", [*lines, ("together", size_text(total))])


# --- numbers ---------------------------------------------------------------------------------------------------------


def _samples(config: Config) -> int:
    return config.buffer.samples_per_group if config.samples or config.offline else 1


def _response_tokens(config: Config) -> int | None:
    if config.generator is None or not config.generates:
        return None
    return config.generator.sampling.max_tokens


def _described(shape: ModelShape) -> str:
    size = f"{shape.parameters:,} parameters, {shape.layers} layers of {shape.hidden}"
    return f": {size}, context {shape.context:,} tokens"


def _share(total: int, parts: int) -> str:
    low, rest = divmod(total, parts)
    return f"{low:,}" if not rest else f"{low:,} or {low + 1:,}"


def _enumerate(steps: list[int]) -> str:
    shown = list(map(str, steps)) if len(steps) <= 8 else [*map(str, steps[:4]), "...", str(steps[-1])]
    return ", ".join(shown)


def size_text(size: float) -> str:
    """Bytes as people read them: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
