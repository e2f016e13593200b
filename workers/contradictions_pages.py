"""What cannot be right in a config of a UTel that reads pages. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.config import Config, PagesTask, UtelModel, UtelObjective, UtelTagObjective


def pages(config: Config) -> Iterator[str]:
    """Contradictions between model, objective and tasks; none where nothing of it is UTel's."""
    strangers = [index for index, task in enumerate(config.tasks) if isinstance(task, PagesTask) != config.reads_pages]
    tag = config.objective.__struct_config__.tag
    if isinstance(config.model, UtelModel) != config.reads_pages:
        wanted = '"utel"' if config.reads_pages else '"path" or "new"'
        yield f"model.type: got {config.model.__struct_config__.tag!r}, expected {wanted} with objective.type = {tag!r}"
    if strangers:
        wanted = '"pages"' if config.reads_pages else 'not "pages"'
        got = config.tasks[strangers[0]].__struct_config__.tag
        yield f"tasks.{strangers[0]}.type: got {got!r}, expected {wanted} with objective.type = {tag!r}"
    if not config.reads_pages or not isinstance(config.model, UtelModel):
        return
    yield from _settings(config, config.model)


def _settings(config: Config, model: UtelModel) -> Iterator[str]:
    for key, given in (("generator", config.generator), ("critic", config.critic)):
        if given is not None:
            yield f"[{key}]: a UTel run has none"
    if config.learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing: got true, expected false: UTel's attention is computed anew by itself"
    try:
        model.shape(max(model.vocabulary, 1))
    except ValueError as error:
        yield f"model: {error}"
    if not config.tasks:
        yield "tasks: got none, expected at least one"
    found = [task for task in config.tasks if isinstance(task, PagesTask)]
    for index, task in enumerate(found):
        if not 0 < task.weight < math.inf:
            yield f"tasks.{index}: weight: got {task.weight}, expected a positive number"
        if task.held_out < 0 or task.joined < 1 or task.synthetic < max(task.joined, 1):
            yield (
                f"tasks.{index}: got held_out {task.held_out}, joined {task.joined}, synthetic {task.synthetic}, expected at "
                "least 0, 1 and as many as are joined"
            )
    if config.eval.prompts and not any(task.held_out for task in found):
        yield f"eval.prompts = {config.eval.prompts}, but no task holds pages out (held_out)"
    if isinstance(config.objective, UtelTagObjective) and not config.objective.fields:
        yield "objective.fields: got none, expected the entity types to tag"
    if isinstance(config.objective, UtelTagObjective):
        for name, share in (("vary", config.objective.vary), ("hide", config.objective.hide)):
            if not 0 <= share < 1:
                yield f"objective.{name}: got {share}, expected 0 or more and less than 1"
    yield from _lengths(config, model)


def _lengths(config: Config, model: UtelModel) -> Iterator[str]:
    if not isinstance(config.objective, UtelObjective | UtelTagObjective):
        return
    for key, length in (
        ("length", config.objective.length),
        *(("test_lengths", length) for length in config.objective.test_lengths),
    ):
        if length < 3:
            yield f"objective.{key}: got {length}, expected at least 3"
        if model.sequence == "absolute" and length > model.max_positions:
            yield (
                f"objective.{key}: got {length}, expected at most model.max_positions = {model.max_positions}, the places in "
                'the table of model.sequence = "absolute"'
            )
