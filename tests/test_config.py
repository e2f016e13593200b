"""Configs: typed, refused by name, and overridden from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ConfigError, JsonlTask, dump_config, load_config, parse_config

TEXT = """
name = "r"
steps = 2
model = { type = "path", path = "m" }
tasks = [{ type = "jsonl", path = "a.jsonl" }, { type = "jsonl", path = "b.jsonl" }]
objective = { type = "dapo" }
buffer = { groups_per_step = 4 }
learner = { lr = 1e-3 }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_what_is_dumped_reads_back_the_same(file: Path) -> None:
    config = load_config(file)
    assert parse_config(dump_config(config), str(file)) == config


def test_overrides_reach_sections_lists_and_plain_text(file: Path) -> None:
    config = load_config(file, ["learner.lr=0.5", "tasks.1.path=c.jsonl", "name=other", "eval.every=3"])
    task = config.tasks[1]
    assert isinstance(task, JsonlTask)
    assert (config.learner.lr, task.path, config.name, config.eval.every) == (0.5, "c.jsonl", "other", 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.lr", "expected section.key=value"),
        ("name.x=1", "name is not a section"),
        ("tasks.2.path=x", "tasks.2: no such section"),
        ("learner.speed=3", r"unknown field `speed` - at `\$.learner`"),
        ("learner.lr=fast", r"Expected `float`, got `str` - at `\$.learner.lr`"),
        ("objective.type=ppo2", r"Invalid value 'ppo2' - at `\$.objective.type`"),
    ],
)
def test_what_cannot_be_is_refused_by_name(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


def test_a_file_that_is_none_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad.toml: not TOML"):
        load_config(tmp_path / "bad.toml")
