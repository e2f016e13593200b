"""Stored logs as training data: what is drawn, in which order, what is refused; and a run that has nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from replayed_run import LETTERS, SAMPLES, Maker, config_of, contents, make_run

from engine.config import Config, JsonlTask, LogTask, PathModel
from engine.fields import TaskError
from engine.models import create_model
from engine.tasks import LogSource
from protocols.log import Log
from workers.check import problems
from workers.intake import Intake
from workers.replay import Request, replay

ROOT = Path(__file__).parent.parent
TRAINED = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 trained groups, 5 dropped ones, an evaluation."""
    return make_run(tmp_path_factory.mktemp("offline") / "trial")


def offline(run: Path, *tasks: LogTask | JsonlTask, **sections: dict) -> Config:
    """A config that trains on these tasks, from the run's starting model."""
    config = config_of(run.parent / "offline", **sections)
    return msgspec.structs.replace(
        config, model=PathModel(str(run / "model")), tasks=list(tasks), generator=None,
        buffer=msgspec.structs.replace(config.buffer, max_lag=0),
    )  # fmt: skip


def drawn(source: LogSource, count: int, start: int = 0) -> list[int]:
    return [source[index].row.group for index in range(start, start + count)]


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_every_epoch_draws_each_group_once_in_another_order(run: Path) -> None:
    source = LogSource([LogTask(str(run))], 7)
    first, second = drawn(source, TRAINED), drawn(source, TRAINED, TRAINED)
    with Log.open(run / "rollouts.db") as log:
        trained = {row.group for row in log.groups(status="trained")}
    assert set(first) == set(second) == trained
    assert len(first) == len(set(first))
    assert first != second
    assert drawn(LogSource([LogTask(str(run / "rollouts.db"))], 7), 5, 10**6) == drawn(source, 5, 10**6), "resumable"
    assert drawn(LogSource([LogTask(str(run))], 8), TRAINED) != first


def test_a_group_comes_with_what_the_log_has_of_it(run: Path) -> None:
    stored = LogSource([LogTask(str(run))], 7)[3]
    with Log.open(run / "rollouts.db") as log:
        for got, kept in zip(stored.rollouts, log.rollouts(stored.row.group), strict=True):
            assert (got.tokens == kept.tokens).all()
            assert (got.logprobs == kept.logprobs).all()
        assert stored.grades == log.grades(stored.row.group)


def test_logs_are_mixed_by_weight(run: Path) -> None:
    source = LogSource([LogTask(str(run), weight=3.0), LogTask([str(run), str(run)], weight=1.0)], 0)
    assert [len(table) for table in source.tables] == [TRAINED, 2 * TRAINED]
    tables = Counter(source._order[index][0] for index in range(1000))
    assert tables == {0: 750, 1: 250}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"dynamic_sampling": False}, TRAINED + 5),
        ({"dynamic_sampling": False, "status": ["dropped"]}, 5),
        ({"status": ["trained"]}, TRAINED),
    ],
)
def test_which_groups_are_drawn(run: Path, settings: dict, count: int) -> None:
    assert len(LogSource([LogTask(str(run), **settings)], 0).tables[0]) == count


def test_groups_that_wait_are_drawn_once_they_are_complete(tmp_path: Path) -> None:
    made = Maker(tmp_path / "live")
    made.step(1)
    made.group([True, False, False], missing=1)
    ready = made.group([True, False])
    made.close()
    waiting = LogSource([LogTask(str(made.folder), status=["waiting"])], 0)
    assert drawn(waiting, 2) == [ready, ready]


def test_held_out_prompts_are_left_out(run: Path) -> None:
    source = LogSource([LogTask(str(run))], 0)
    texts = {source[index].row.prompt_text for index in range(TRAINED)}
    some = frozenset(sorted(texts)[:4])
    left = LogSource([LogTask(str(run))], 0, without=some)
    assert {left[index].row.prompt_text for index in range(2 * TRAINED)} == texts - some


def test_an_entry_is_a_group_of_this_run(run: Path) -> None:
    intake = Intake(offline(run, LogTask(str(run))))
    entry = intake.train(40, min_version=2)
    assert (entry.row.group, entry.row.kind, entry.row.source_index, entry.row.samples) == (40, "ready", 0, SAMPLES)
    assert (entry.row.status, entry.row.step) == ("waiting", None)
    assert entry.origin.startswith("trial:")
    assert [r.versions for r in entry.rollouts] == [[(2, len(r.tokens))] for r in entry.rollouts], "never too old"
    assert {grade.group for grade in entry.grades} == {rollout.group for rollout in entry.rollouts} == {40}


# --- what is refused -------------------------------------------------------------------------------------------------


def other_model(folder: Path, alphabet: str) -> PathModel:
    model = msgspec.structs.replace(config_of(folder).model, alphabet=alphabet)
    create_model(model, folder, 0)  # type: ignore[arg-type]
    return PathModel(str(folder))


@pytest.mark.parametrize(
    ("alphabet", "said"),
    [
        (" =ab", r"has token \d+, the model's vocabulary ends at \d+: it was made with another model"),
        (LETTERS[::-1] + " =", "in the tokenizer of .*: it was made with another tokenizer"),
    ],
)
def test_a_log_of_another_model_is_refused(run: Path, tmp_path: Path, alphabet: str, said: str) -> None:
    config = msgspec.structs.replace(offline(run, LogTask(str(run))), model=other_model(tmp_path / "m", alphabet))
    with pytest.raises(TaskError, match=said):
        Intake(config)


def test_a_log_that_cannot_be_used_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"nosuch: no such log"):
        LogSource([LogTask(str(tmp_path / "nosuch"))], 0)
    with pytest.raises(TaskError, match="no group to train on; looked for status waiting, neither all right nor all"):
        LogSource([LogTask(str(run), status=["waiting"])], 0)
    (tmp_path / "rollouts.db").write_bytes(b"not a log" * 1000)
    with pytest.raises(TaskError, match=r"rollouts\.db: cannot be read"):
        LogSource([LogTask(str(tmp_path))], 0)


def test_contradictions(run: Path) -> None:
    good = offline(run, LogTask(str(run)))
    assert problems(good) == []
    evaluated = msgspec.structs.replace(good.eval, prompts=1)
    for config, said in (
        (offline(run, LogTask(str(run)), objective={"type": "sft"}), "a log has responses"),
        (offline(run, LogTask([], weight=0.0)), "path: got none"),
        (offline(run, LogTask(str(run), status=[])), "status: got none"),
        (offline(run, LogTask(str(run), weight=-1.0)), "weight: got -1.0"),
        (msgspec.structs.replace(good, eval=evaluated), "eval.prompts = 1 needs a [generator]"),
    ):
        assert any(said in problem for problem in problems(config)), said


# --- a run -----------------------------------------------------------------------------------------------------------


CONFIG = """
name = "offline"
runs = "FOLDER"
steps = 5
model = { type = "path", path = "RUN/model" }
objective = { type = "dapo" }
buffer = { groups_per_step = 4, samples_per_group = 4, max_lag = 0, prompt_tokens = 16 }
learner = { lr = 1e-2, token_budget = 64, updates_per_step = 2, checkpoint_every = 2, device = "cpu" }
tasks = [{ type = "log", path = "RUN" }]
"""


def test_an_offline_run_trains_and_is_verified(run: Path, tmp_path: Path) -> None:
    """Without generator and reward: a buffer and a learner. 5 steps of 4 groups are more than one epoch of 12."""
    before = contents(run)
    path = tmp_path / "offline.toml"
    path.write_text(CONFIG.replace("FOLDER", str(tmp_path)).replace("RUN", str(run)), encoding="utf-8")
    command = [sys.executable, "-m", "workers.cli", "launch", "--no-view", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr + done.stdout
    assert contents(run) == before
    with Log.open(tmp_path / "offline" / "rollouts.db") as log:
        assert log.counts()["ready", "trained"][:2] == (20, 20 * SAMPLES)
        rows = list(log.steps())
        assert [row.metrics["masked_fraction"] for row in rows] == [0.0] * 5
        assert [row.metrics["lag_max"] for row in rows] == [0.0] * 5
        assert all(row.metrics["grad_norm"] > 0 for row in rows)
        origins = [worker for (worker,) in log.query("SELECT DISTINCT worker FROM rollouts ORDER BY group_id")]
        assert len(set(origins[:TRAINED])) == TRAINED
        assert {worker for (worker,) in log.query("SELECT DISTINCT worker FROM grades")} == set(origins)
    assert replay(Request(str(tmp_path / "offline")), []) == 0
    shutil.rmtree(tmp_path / "offline")
