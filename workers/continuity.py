"""What must stay as it was when a run is continued. No torch here.

The prompts of a run are a function of its seed and its tasks, and what is held out is too: with others, prompts would
come twice, and evaluation would ask what was trained on. Steps, lengths, rates, scoring and where files lie may change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.config import ConfigError

MAY_CHANGE = frozenset({"path", "held_out_path", "score", "extract"})
"""Of a task and of the model: files may have moved, and a broken scoring function may have been put right."""


def same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Both as `dump_config` gives them. Raises `ConfigError` naming the first key that differs and must not."""
    for key, was, got in _differences(_fixed(before), _fixed(now)):
        raise ConfigError(
            f"{key}: got {got!r}, but the run that is continued has {was!r}; expected the same, or another name"
        )


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    fixed: dict[str, Any] = {"seed": config["seed"], "objective.type": config["objective"]["type"]}
    sections = {"model": config["model"], **{f"tasks.{i}": task for i, task in enumerate(config["tasks"])}}
    for name, section in sections.items():
        fixed |= {f"{name}.{key}": value for key, value in section.items() if key not in MAY_CHANGE}
    return fixed


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for key in before | now:
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)
