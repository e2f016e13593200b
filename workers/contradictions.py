"""What cannot be right in a config, found before anything starts: each text names the keys and the values that clash.

Values out of range, settings that starve or deadlock the run, lengths that do not fit. What is allowed and perhaps not
meant is in `remarks`. No torch here: the buffer refuses with these too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePath

from engine.config import (
    Config,
    ConfigError,
    DapoObjective,
    IcepopCorrection,
    JsonlTask,
    NewModel,
    PpoObjective,
    PythonScore,
    ReasoningGymTask,
    SftObjective,
    Task,
    TruncatedCorrection,
    load_config,
)
from engine.tasks import named_tasks
from workers.contradictions_backend import backend
from workers.contradictions_critic import critic
from workers.contradictions_engine import generator_engine
from workers.contradictions_offline import offline
from workers.contradictions_pages import pages
from workers.model_shape import ModelShape, model_shape, starting_model


def errors(config: Config) -> list[str]:
    """Every contradiction in the config, in the order of its sections."""
    if config.reads_pages:
        return [*_ranges(config), *_run(config), *backend(config), *pages(config)]
    if wrong := list(pages(config)):
        return wrong
    found = [*_ranges(config), *_run(config), *_tasks(config), *_buffer(config), *_lengths(config), *offline(config)]
    found += [*critic(config), *backend(config)]
    if not isinstance(config.objective, SftObjective):
        found += [*_sampling(config), *_overlong(config)]
    elif unsolved := [name for name, task in named_tasks(config.tasks).items() if _no_solution(task)]:
        found.append(f'objective.type = "sft" trains on solutions, and task {unsolved[0]} has no `solution`')
    return found


def _ranges(config: Config) -> Iterator[str]:
    buffer, reward, learner, evaluation = config.buffer, config.reward, config.learner, config.eval
    at_least: list[tuple[str, float, float]] = [
        ("steps", config.steps, 1),
        ("buffer.groups_per_step", buffer.groups_per_step, 1),
        ("buffer.samples_per_group", buffer.samples_per_group, 1),
        ("buffer.max_lag", buffer.max_lag, 0),
        ("buffer.max_oversample", buffer.max_oversample, 1),
        ("buffer.prompt_tokens", buffer.prompt_tokens, 1),
        ("reward.count", reward.count, 0),
        ("reward.scorers", reward.scorers, 1),
        ("reward.attempts", reward.attempts, 1),
        ("learner.ranks", learner.ranks, 1),
        ("learner.updates_per_step", learner.updates_per_step, 1),
        ("learner.warmup_steps", learner.warmup_steps, 0),
        ("learner.decay_steps", learner.decay_steps, learner.warmup_steps + 1 if learner.decay_steps else 0),
        ("learner.weight_decay", learner.weight_decay, 0),
        ("learner.threads", learner.threads, 1),
        ("learner.checkpoint_every", learner.checkpoint_every, 1),
        ("learner.keep_checkpoints", learner.keep_checkpoints, 1),
        ("learner.bucket_mb", learner.bucket_mb, 1),
        ("eval.prompts", evaluation.prompts, 0),
        ("eval.samples", evaluation.samples, 1),
        ("eval.every", evaluation.every, 0),
    ]
    above_zero: list[tuple[str, float]] = [
        ("buffer.lease_s", buffer.lease_s),
        ("buffer.heartbeat_s", buffer.heartbeat_s),
        ("reward.timeout_s", reward.timeout_s),
        ("reward.memory_mb", reward.memory_mb),
        ("learner.lr", learner.lr),
        ("learner.grad_clip", learner.grad_clip),
        ("learner.peer_timeout_s", learner.peer_timeout_s),
        ("eval.temperature", evaluation.temperature),
        ("eval.top_p", evaluation.top_p),
    ]
    if config.generator is not None:
        at_least += [
            ("generator.count", config.generator.count, 0),
            ("generator.engine.slots", config.generator.engine.slots, 1),
            ("generator.threads", config.generator.threads, 1),
        ]
        yield from generator_engine(config.generator)
    for name, got, low in at_least:
        if not low <= got < math.inf:
            yield f"{name}: got {got}, expected at least {low}"
    for name, got in above_zero:
        if not 0 < got < math.inf:
            yield f"{name}: got {got}, expected a positive number"
    if evaluation.top_p > 1:
        yield f"eval.top_p: got {evaluation.top_p}, expected at most 1"
    if not all(0 <= beta < 1 for beta in learner.betas):
        yield f"learner.betas: got {list(learner.betas)}, expected two numbers in [0, 1)"


def _run(config: Config) -> Iterator[str]:
    if PurePath(config.name).parts != (config.name,) or config.name in ("..", "/"):
        yield f"name: got {config.name!r}, expected one folder name"
    for key, device in [("learner", config.learner.device)] + (
        [("generator", config.generator.device)] if config.generator else []
    ):
        if device not in ("auto", "cpu", "cuda") and not device.removeprefix("cuda:").isdecimal():
            yield f'{key}.device: got {device!r}, expected "auto", "cpu", "cuda" or "cuda:N"'
    if isinstance(config.model, NewModel):
        yield from _new_model(config.model)
    if config.cold_start:
        try:
            first, start = load_config(config.cold_start), starting_model(config)
        except ConfigError as error:
            yield f"cold_start: {error}"
            return
        if first.run_dir == config.run_dir:
            yield f"cold_start: {config.cold_start} and this run have the same folder, {config.run_dir}; expected two names"
        if start != config.model:
            yield f"model: got {config.model}, but cold_start {config.cold_start} trains {start}; expected the same model"


def _new_model(model: NewModel) -> Iterator[str]:
    sizes = {
        name: getattr(model, name) for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "context")
    }
    small = [f"model.{name}: got {size}, expected at least 1" for name, size in sizes.items() if size < 1]
    if small:
        yield from small
    elif model.hidden % (2 * model.heads):
        yield f"model.hidden = {model.hidden} is not an even multiple of model.heads = {model.heads}"
    elif model.heads % model.kv_heads:
        yield f"model.heads = {model.heads} is not a multiple of model.kv_heads = {model.kv_heads}"
    if len(set(model.alphabet)) != len(model.alphabet) or not model.alphabet:
        yield f"model.alphabet: got {model.alphabet!r}, expected at least one character, each once"


def _tasks(config: Config) -> Iterator[str]:
    if not config.tasks:
        yield "tasks: got none, expected at least one"
        return
    pool: float = 0
    for name, task in named_tasks(config.tasks).items():
        where = f"task {name}"
        if not 0 < task.weight < math.inf:
            yield f"{where}: weight: got {task.weight}, expected a positive number"
        if task.held_out < 0:
            yield f"{where}: held_out: got {task.held_out}, expected at least 0"
        pool += math.inf if isinstance(task, JsonlTask) and task.held_out_path else task.held_out
        if isinstance(task, ReasoningGymTask) and task.held_out >= task.size:
            yield f"{where}: held_out = {task.held_out} leaves nothing of size = {task.size} to train on"
        if isinstance(task.score, PythonScore) and not all(task.score.function.partition(":")):
            yield f"{where}: score.function: got {task.score.function!r}, expected module:function"
        messages = isinstance(task, JsonlTask) and task.messages is not None
        if not task.chat and (messages or task.system is not None):
            yield f"{where}: chat = false, but {'messages' if messages else 'system'} needs the chat template"
        if task.chat and isinstance(config.model, NewModel):
            yield f'{where}: chat = true, but model.type = "new" has no chat template; set chat = false'
    if config.eval.prompts > pool:
        yield f"eval.prompts = {config.eval.prompts} exceeds the {pool:.0f} held-out prompts of the tasks (held_out)"


def _buffer(config: Config) -> Iterator[str]:
    buffer, learner = config.buffer, config.learner
    if learner.updates_per_step > buffer.groups_per_step:
        yield (
            f"learner.updates_per_step = {learner.updates_per_step} exceeds buffer.groups_per_step = "
            f"{buffer.groups_per_step}: an update needs at least one group"
        )
    if buffer.lease_s <= buffer.heartbeat_s:
        yield (
            f"buffer.lease_s = {buffer.lease_s} does not outlive buffer.heartbeat_s = {buffer.heartbeat_s}: "
            "every ticket would run out before its generator can renew it, and nothing would ever finish"
        )
    if "://" in buffer.address and not buffer.address.startswith("tcp://"):
        yield f"buffer.address: got {buffer.address!r}, expected tcp://HOST:PORT"


def _lengths(config: Config) -> Iterator[str]:
    prompt, budget = config.buffer.prompt_tokens, config.learner.token_budget
    if budget < prompt + 1:
        yield (
            f"learner.token_budget = {budget} cannot hold buffer.prompt_tokens = {prompt} and one response token; "
            f"expected at least {prompt + 1}"
        )
    shape = _shape(config)
    if shape is None:
        return
    longest, names = prompt + 1, f"buffer.prompt_tokens = {prompt} and one response token"
    if config.generator is not None and config.generates:
        response = config.generator.sampling.max_tokens
        longest, names = (
            prompt + response,
            f"buffer.prompt_tokens = {prompt} + generator.sampling.max_tokens = {response}",
        )
    if longest > shape.context:
        yield f"{names} exceed the model's context of {shape.context} tokens"


def _sampling(config: Config) -> Iterator[str]:
    objective, samples = config.objective, config.buffer.samples_per_group
    if config.generator is None and not config.offline:
        yield f'objective.type = "{objective.__struct_config__.tag}" needs samples, and there is no [generator]'
    if samples == 1 and config.buffer.dynamic_sampling:
        yield (
            f"buffer.samples_per_group = {samples} with buffer.dynamic_sampling = true: a group of one is always all right "
            "or all wrong, so every group would be dropped and no step would ever start; expected at least 2"
        )
    elif samples == 1 and isinstance(objective, DapoObjective) and objective.normalize_std:
        yield (
            f"buffer.samples_per_group = {samples} with objective.normalize_std = true: one reward has no deviation; "
            "expected at least 2"
        )
    if isinstance(objective, DapoObjective | PpoObjective):
        yield from _surrogate(objective)
    if not config.reward.right > config.reward.wrong:
        yield f"reward.right = {config.reward.right} is not more than reward.wrong = {config.reward.wrong}"


def _surrogate(objective: DapoObjective | PpoObjective) -> Iterator[str]:
    for name, clip in (("clip_low", objective.clip_low), ("clip_high", objective.clip_high)):
        if not 0 < clip < 1:
            yield f"objective.{name}: got {clip}, expected a number in (0, 1)"
    if objective.dual_clip is not None and not objective.dual_clip > 1:
        yield f"objective.dual_clip: got {objective.dual_clip}, expected more than 1"
    match objective.correction:
        case TruncatedCorrection(cap=cap) if not cap > 0:
            yield f"objective.correction.cap: got {cap}, expected a positive number"
        case IcepopCorrection(low=low, high=high) if not 0 <= low < 1 < high:
            yield (
                f"objective.correction: got low = {low} and high = {high}, expected 0 <= low < 1 < high: "
                "an on-policy token has the weight 1"
            )


def _overlong(config: Config) -> Iterator[str]:
    overlong = config.reward.overlong
    if overlong is None:
        return
    if not 0 < overlong.cache < overlong.max_length:
        yield (
            f"reward.overlong.cache = {overlong.cache} is not between 0 and reward.overlong.max_length = "
            f"{overlong.max_length}"
        )
    if config.generator is not None and overlong.max_length > config.generator.sampling.max_tokens:
        yield (
            f"reward.overlong.max_length = {overlong.max_length} exceeds generator.sampling.max_tokens = "
            f"{config.generator.sampling.max_tokens}: no response would ever get that long"
        )


def missing_model(config: Config) -> str | None:
    """Why the model cannot be had on this machine; None when it is there or the run makes it."""
    try:
        model_shape(config)
    except ConfigError as error:
        return str(error)
    return None


def _shape(config: Config) -> ModelShape | None:
    try:
        return model_shape(config)
    except (ConfigError, ZeroDivisionError):
        return None


def _no_solution(task: Task) -> bool:
    return isinstance(task, JsonlTask) and task.solution is None
