"""What a config allows and perhaps does not mean: settings without effect, and choices worth knowing."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import (
    CollectObjective,
    Config,
    DapoObjective,
    GeneratorConfig,
    NoCorrection,
    PpoObjective,
    SftObjective,
)

HEARTBEATS = 3
"""A lease should outlive this many heartbeats, for one may be late or lost."""


def notes(config: Config) -> list[str]:
    """What is allowed and perhaps not meant."""
    if config.reads_pages:
        return []
    found = [*_idle_settings(config), *_splits(config)]
    if config.generator is not None and config.generates:
        found += [*_sampling(config, config.generator), *_capacity(config, config.generator)]
    return [*found, *_critic(config)]


def _critic(config: Config) -> Iterator[str]:
    collects = isinstance(config.objective, CollectObjective)
    if config.buffer.dynamic_sampling and (collects or isinstance(config.objective, PpoObjective)):
        yield (
            "buffer.dynamic_sampling = true: the critic learns from groups with right and wrong answers only, so it "
            "overestimates prompts that are always failed and underestimates those that never are"
        )
    if collects and config.critic is not None and config.critic.path is not None:
        yield "[critic]: the run itself trains no critic; `headrace pretrain-critic` takes its settings from here"


def _idle_settings(config: Config) -> Iterator[str]:
    learner, evaluation = config.learner, config.eval
    if learner.warmup_steps > config.steps:
        yield f"learner.warmup_steps = {learner.warmup_steps} exceeds steps = {config.steps}: lr never reaches {learner.lr}"
    if 0 < learner.decay_steps < config.steps:
        yield f"learner.decay_steps = {learner.decay_steps} is less than steps = {config.steps}: lr is 0 in the steps after it"
    if learner.checkpoint_every > config.steps:
        yield f"learner.checkpoint_every = {learner.checkpoint_every} exceeds steps = {config.steps}: one checkpoint, at the end"
    if evaluation.every > config.steps:
        yield f"eval.every = {evaluation.every} exceeds steps = {config.steps}: evaluation only before and after"
    if not isinstance(config.objective, SftObjective):
        return
    ignored = ["buffer.samples_per_group (a row has one solution)"] if config.buffer.samples_per_group > 1 else []
    ignored += ["[generator]"] if config.generator is not None else []
    ignored += ["[eval]"] if evaluation.prompts else []
    ignored += ["[reward.overlong]"] if config.reward.overlong is not None else []
    if ignored:
        yield f'objective.type = "sft" samples nothing: {", ".join(ignored)} has no effect'


def _splits(config: Config) -> Iterator[str]:
    groups, updates, ranks = config.buffer.groups_per_step, config.learner.updates_per_step, config.learner.ranks
    if updates <= groups and groups % updates:
        yield f"buffer.groups_per_step = {groups} is not a multiple of learner.updates_per_step = {updates}: updates differ in size"
    if updates <= groups < updates * ranks:
        yield (
            f"learner.ranks = {ranks} x learner.updates_per_step = {updates} exceeds buffer.groups_per_step = {groups}: "
            "in some updates a rank has nothing to do"
        )


def _sampling(config: Config, generator: GeneratorConfig) -> Iterator[str]:
    sampling, learner, objective = generator.sampling, config.learner, config.objective
    longest = config.buffer.prompt_tokens + sampling.max_tokens - 1
    if longest > learner.token_budget:
        yield (
            f"the longest sequence, {longest} tokens, exceeds learner.token_budget = {learner.token_budget}: such a one "
            "makes a micro-batch of its own, larger than the budget"
        )
    if sampling.top_p < 1 or sampling.top_k > 0:
        yield (
            f"generator.sampling: top_p = {sampling.top_p} and top_k = {sampling.top_k} sample from less than the "
            "distribution that is trained"
        )
    if isinstance(objective, DapoObjective | PpoObjective):
        yield from _surrogate(config, objective)
    if generator.dtype != learner.dtype:
        yield f"generator.dtype = {generator.dtype} and learner.dtype = {learner.dtype}: their log-probabilities differ"


def _surrogate(config: Config, objective: DapoObjective | PpoObjective) -> Iterator[str]:
    if config.buffer.max_lag > 0 and isinstance(objective.correction, NoCorrection):
        yield (
            f'objective.correction.type = "none" with buffer.max_lag = {config.buffer.max_lag}: '
            "the clip acts on the distance from the weights that sampled, not from the step's start"
        )
    if objective.overlong_filter and config.reward.overlong is not None:
        yield (
            "objective.overlong_filter and [reward.overlong] are both on: a truncated response is not trained on, "
            "its punishment acts through its group's mean only"
            if isinstance(objective, DapoObjective)
            else "and its punishment has no effect"
        )


def _capacity(config: Config, generator: GeneratorConfig) -> Iterator[str]:
    buffer = config.buffer
    if buffer.lease_s < HEARTBEATS * buffer.heartbeat_s:
        yield (
            f"buffer.lease_s = {buffer.lease_s} is less than {HEARTBEATS} x buffer.heartbeat_s = {buffer.heartbeat_s}: "
            "one late heartbeat takes a generator's work away"
        )
    if generator.count == 0 or config.reward.count == 0:
        role = "generator" if generator.count == 0 else "reward"
        yield f"{role}.count = 0: the run waits until a {role} worker joins by hand"
    slots = generator.engine.slots
    if slots < buffer.samples_per_group:
        yield (
            f"generator.engine.slots = {slots} is less than buffer.samples_per_group = {buffer.samples_per_group}: "
            "a group's prompt is computed more than once"
        )
    most = int(buffer.max_oversample * (buffer.max_lag + 1) * buffer.groups_per_step) * buffer.samples_per_group
    if slots * generator.count > most:
        yield (
            f"{generator.count} x {slots} generator slots exceed the {most} samples that may be in the system: "
            "some slots never fill"
        )
