"""Every config that ships loads, contradicts nothing, and names data sets and functions that exist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import dump_config, load_config, parse_config
from engine.rewards import prepare
from engine.tasks import prompt_tasks
from workers.check import problems

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def at_the_root() -> Iterator[None]:
    """Paths in configs are relative to the repository."""
    with contextlib.chdir(ROOT):
        yield


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_loads_and_could_run(path: Path) -> None:
    config = load_config(path)
    assert problems(config) == []  # a model or data that has to be fetched first is not among them
    assert dump_config(parse_config(dump_config(config), "again")) == dump_config(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_tasks_can_be_scored(path: Path) -> None:
    for task in prompt_tasks(load_config(path).tasks):
        prepare(task)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_its_cold_start_is_a_config_too(path: Path) -> None:
    cold_start = load_config(path).cold_start
    assert cold_start is None or ROOT / cold_start in CONFIGS


def test_run_names_are_distinct() -> None:
    names = [load_config(path).name for path in CONFIGS]
    assert len(names) == len(set(names))
