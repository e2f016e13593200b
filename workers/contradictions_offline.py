"""What cannot be right in a config that trains on stored logs. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from engine.config import Config, LogTask, SftObjective


def offline(config: Config) -> Iterator[str]:
    """Contradictions between stored logs and the rest of a config; none without stored logs."""
    for index, task in enumerate(config.tasks):
        if not isinstance(task, LogTask):
            continue
        where = f"tasks.{index} (log)"
        if not task.path:
            yield f"{where}: path: got none, expected at least one log"
        if not task.status:
            yield f"{where}: status: got none, expected at least one of trained, dropped, waiting"
        if not 0 < task.weight < math.inf:
            yield f"{where}: weight: got {task.weight}, expected a positive number"
    if not config.offline:
        return
    if isinstance(config.objective, SftObjective):
        yield 'objective.type = "sft" trains on solutions, and a log has responses, right and wrong ones'
    if config.eval.prompts and config.generator is None:
        yield f"eval.prompts = {config.eval.prompts} needs a [generator]; the logs have nothing that these weights sampled"
