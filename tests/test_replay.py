"""A stored run trained again comes to the same weights, or says where it does not; with other settings it is a new run."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from replayed_run import GROUPS, SAMPLES, Maker, contents, make_run
from rich.console import Console

from engine.checkpoint import load_checkpoint
from engine.config import ConfigError
from protocols.log import Log
from workers.compare import compare, spread
from workers.inspect import export, show
from workers.metrics import read_metrics
from workers.replay import Request, replay
from workers.replay_source import ReplayError
from workers.report import report

ROOT = Path(__file__).parent.parent


def headrace(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def change(folder: Path, *statements: str) -> None:
    """Statements on a log, past everything that guards it."""
    connection = sqlite3.connect(folder / "rollouts.db")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def hashes(folder: Path) -> list[str]:
    with Log.open(folder / "rollouts.db") as log:
        return [row.weights_hash for row in log.steps()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("replay") / "trial")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


# --- verify ----------------------------------------------------------------------------------------------------------


def test_a_run_is_verified_and_left_as_it_is(run: Path) -> None:
    before = contents(run)
    found = headrace("replay", run, "--verify")
    assert found.returncode == 0, found.stderr
    assert "4 steps verified (1 to 4)" in found.stdout
    assert "steps/s" in found.stdout
    assert "of the logged training time" in found.stdout
    assert contents(run) == before


def test_the_first_step_that_differs_is_named_with_its_weights(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(
        copy,
        "UPDATE steps SET code_version = '0.0.9'",
        "UPDATE grades SET reward = -reward WHERE group_id = (SELECT group_id FROM plan WHERE step = 3 LIMIT 1)",
    )
    assert replay(Request(str(copy)), []) == 1
    said = capfd.readouterr().out
    assert f"{copy}: step 3 differs: re-trained to " in said
    assert f"the log has {hashes(copy)[2]}" in said
    assert "by name the first is model.embed_tokens.weight" in said
    assert "steps 1 to 2 came to the weights in the log" in said
    assert "another code version: the step was trained by 0.0.9, this is " in said
    assert replay(Request(str(copy), start=2, last=3), []) == 1
    assert replay(Request(str(copy), last=2), []) == 0


def test_one_weight_that_differs_is_named(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(
        copy,
        """UPDATE steps SET weights_hash = 'other',
        fingerprints = json_set(fingerprints, '$."model.norm.weight"', 'other') WHERE step = 2""",
    )
    assert replay(Request(str(copy)), []) == 1
    assert "differ, by name the first is model.norm.weight" in capfd.readouterr().out


def test_it_starts_from_a_checkpoint_of_the_run(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "model")  # not needed then
    change(copy, "UPDATE steps SET weights_hash = 'other' WHERE step = 1")
    assert replay(Request(str(copy), start=2), []) == 0
    assert "2 steps verified (3 to 4)" in capfd.readouterr().out
    with pytest.raises(ReplayError, match=r"step-000003: no such checkpoint; the run has 2, 4"):
        replay(Request(str(copy), start=3), [])
    change(copy, "UPDATE steps SET weights_hash = 'other' WHERE step = 2")
    with pytest.raises(ReplayError, match=r"step-000002: of another run: its weights are \w+, expected other"):
        replay(Request(str(copy), start=2), [])


def test_a_checkpoint_of_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    other = Maker(tmp_path / "other", model={"hidden": 32})
    for step in (1, 2):
        other.step(step)
    shutil.rmtree(copy / "checkpoints" / "step-000002")
    shutil.copytree(other.close() / "checkpoints" / "step-000002", copy / "checkpoints" / "step-000002")
    change(copy, f"UPDATE steps SET weights_hash = '{hashes(tmp_path / 'other')[1]}' WHERE step = 2")
    assert replay(Request(str(copy), start=2, last=4), []) == 1  # a model of its own: it only trains to other weights


def test_a_run_that_went_on_with_another_config_switches_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Maker(tmp_path / "trial")
    made.step(1)
    made.step(2)
    made.go_on_with(2, learner={"lr": 3e-2, "updates_per_step": 1}, objective={"clip_high": 0.4})
    made.step(3)
    made.step(4)
    folder = made.close()
    assert replay(Request(str(folder)), []) == 0
    assert "4 steps verified" in capfd.readouterr().out
    change(folder, "UPDATE steps SET config_id = (SELECT config_id FROM steps WHERE step = 1)")
    assert replay(Request(str(folder)), []) == 1
    assert "step 3 differs" in capfd.readouterr().out


def test_a_run_with_a_critic_is_verified_with_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through its value pretraining, a change of its settings, and from a checkpoint in between."""
    critic = {"lr": 1e-2, "pretrain_steps": 2}
    made = Maker(tmp_path / "critic", objective={"type": "vcppo"}, critic=critic)
    made.step(1)
    made.step(2)
    made.go_on_with(2, objective={"type": "vcppo"}, critic={**critic, "lr": 3e-2})
    made.step(3)
    made.step(4)
    folder = made.close()
    assert replay(Request(str(folder)), []) == 0
    assert replay(Request(str(folder), start=2), []) == 0
    print_of = """json_set(fingerprints, '$."critic.model.norm.weight"', 'other')"""
    change(folder, f"UPDATE steps SET weights_hash = 'other', fingerprints = {print_of} WHERE step = 4")
    assert replay(Request(str(folder)), []) == 1
    assert "1 of " in (said := capfd.readouterr().out)
    assert "the first is critic.model.norm.weight" in said


def test_a_starting_model_that_is_not_the_runs_any_more_is_named(copy: Path, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    change(copy, f"""UPDATE meta SET value = json_set(value, '$.folder', '{moved}') WHERE key = 'start'""")
    assert replay(Request(str(copy)), []) == 0, "the run's own model has the same weights"
    shutil.rmtree(copy / "model")
    shutil.copytree(run / "checkpoints" / "step-000002", copy / "model")
    with pytest.raises(
        ReplayError, match=r"copy/model has other weights now. Expected .*/moved as it was; --from STEP"
    ):
        replay(Request(str(copy)), [])
    shutil.rmtree(copy / "model")
    with pytest.raises(ReplayError, match=r"moved has no weights; .*copy/model has no weights"):
        replay(Request(str(copy)), [])


def test_a_run_that_goes_on_is_verified_as_far_as_it_is_committed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = Maker(tmp_path / "live")
    made.step(1)
    made.step(2)
    made.plan(3)
    made.group([True, False, False, False])
    assert replay(Request(str(made.folder)), []) == 0
    assert "2 steps verified (1 to 2)" in capfd.readouterr().out
    made.close()


# --- bad input -------------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "rollouts.db"
    os.truncate(path, path.stat().st_size // 2)


def garble(folder: Path) -> None:
    path = folder / "rollouts.db"
    with path.open("r+b") as file:
        file.seek(16384)
        file.write(b"\xff" * (path.stat().st_size - 16384))


def without(*statements: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, "PRAGMA foreign_keys = OFF", *statements)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("PRAGMA user_version = 1"), "got schema version 1, expected"),
        (without("DELETE FROM steps"), "no step is committed; 4 steps are planned: train them with --out"),
        (without("DELETE FROM steps WHERE step = 2"), "step 2 is missing; the log goes on with step 3"),
        (without("DELETE FROM plan WHERE step = 3"), "the plan of step 3 is missing, and it was trained"),
        (without("DELETE FROM groups WHERE id = (SELECT group_id FROM plan WHERE step = 2)"), "of step 2's plan is missing"),
        (without("DELETE FROM prompts WHERE group_id = (SELECT group_id FROM plan WHERE step = 2)"), "of step 2's plan is"),
        (without("DELETE FROM rollouts WHERE group_id = (SELECT group_id FROM plan WHERE step = 2)"), "or has no responses"),
        (without("UPDATE rollouts SET versions = '[[9, ' || response_tokens || ']]' WHERE id = 20"), "a token of version 9"),
        (without("UPDATE steps SET config_id = 'gone'"), "config gone is not in the log"),
        (truncate, "rollouts.db: cannot be read: "),
        (garble, "rollouts.db: cannot be read: "),
    ],
)  # fmt: skip
def test_a_bad_log_is_one_error_and_left_alone(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copy)
    before = contents(copy)
    with pytest.raises(ReplayError, match=said) as caught:
        replay(Request(str(copy)), [])
    assert str(copy) in str(caught.value)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"run": "nosuch"}, "nosuch: no such run: looked for nosuch/rollouts.db and runs/nosuch/rollouts.db"),
        ({"last": 9}, "asked for steps 1 to 9, it has 1 to 4"),
        ({"start": 4}, "asked for steps 5 to 4, it has 1 to 4"),
        ({"overrides": ["learner.lr=-1"]}, r"learner\.lr: got -1\.0"),
        ({"overrides": ["learner.rate=1"]}, "unknown field `rate`"),
        ({"overrides": ["learner.lr"]}, "expected section.key=value"),
    ],
)
def test_what_cannot_be_replayed_is_refused(run: Path, tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replay(Request(**{"run": str(run), "out": str(tmp_path / "new"), **arguments}), [])
    assert not (tmp_path / "new").exists()


def test_bad_input_has_exit_code_2_and_one_line(copy: Path, run: Path) -> None:
    truncate(copy)
    for arguments, said in (
        (("replay", copy, "--verify"), "rollouts.db: cannot be read"),
        (("replay", run), "either --verify or --out NEW"),
    ):
        found = headrace(*arguments)
        assert found.returncode == 2, found.stderr
        assert said in found.stderr
        assert len(found.stderr.splitlines()) == 1


# --- another run from the same data ----------------------------------------------------------------------------------


def test_other_settings_make_a_run_of_their_own(run: Path, tmp_path: Path) -> None:
    before, new = contents(run), tmp_path / "new"
    request = Request(str(run), overrides=["objective.clip_high=0.9", "learner.lr=3e-2"], out=str(new))
    assert replay(request, []) == 0
    assert contents(run) == before
    with Log.open(run / "rollouts.db") as old, Log.open(new / "rollouts.db") as log:
        assert (log.meta.run, log.meta.config["learner"]["lr"], log.last_step()) == ("new", 3e-2, 4)
        assert log.meta.origin is not None
        assert log.meta.origin.settings == request.overrides
        for step in range(1, 5):
            assert log.plan(step) == old.plan(step)
            groups = log.plan(step) or []
            a, b = old.batch(step, groups), log.batch(step, groups)
            assert all(
                (getattr(a, name) == getattr(b, name)).all() for name in ("tokens", "logprobs", "versions", "rewards")
            )
            assert {log.group(group).status for group in groups} == {"trained"}  # type: ignore[union-attr]
        assert log.counts().keys() == {("train", "trained")}
    assert set(hashes(run)).isdisjoint(hashes(new))
    assert [row["step"] for row in read_metrics(new).steps] == [1, 2, 3, 4]
    assert list((new / "tensorboard").iterdir())
    assert load_checkpoint(new / "checkpoints" / "step-000004")[2]["weights_hash"] == hashes(new)[-1]
    with pytest.raises(ReplayError, match="holds a run already; continue it with --resume"):
        replay(request, [])
    assert replay(Request(str(new)), []) == 0
    show(new, step=2, console=Console(file=io.StringIO()))
    assert report(new, Console(file=io.StringIO())).groups == {"trained": 4 * GROUPS}
    assert export(new, tmp_path / "rows.jsonl") == 4 * GROUPS * SAMPLES


def test_the_same_settings_come_to_the_same_weights(run: Path, tmp_path: Path) -> None:
    assert replay(Request(str(run), out=str(tmp_path / "new")), []) == 0
    assert hashes(tmp_path / "new") == hashes(run)


def test_a_replay_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    first, whole = str(tmp_path / "first"), str(tmp_path / "whole")
    changed = ["learner.lr=3e-2"]
    assert replay(Request(str(run), last=3, overrides=changed, out=first), []) == 0
    with pytest.raises(ReplayError, match=r"made with --set learner.lr=3e-2, got learner.lr=1e-3"):
        replay(Request(str(run), overrides=["learner.lr=1e-3"], out=first, resume=True), [])
    assert replay(Request(str(run), overrides=changed, out=first, resume=True), []) == 0
    assert replay(Request(str(run), overrides=changed, out=whole), []) == 0
    assert hashes(Path(first)) == hashes(Path(whole))
    with Log.open(Path(first) / "rollouts.db") as log:
        assert [log.config(row.config_id)["steps"] for row in log.steps()] == [3, 3, 3, 4]
    assert replay(Request(first), []) == 0


def test_a_replay_that_was_killed_goes_on_after_its_last_whole_step(tmp_path: Path) -> None:
    long, new = make_run(tmp_path / "long", steps=30), tmp_path / "new"
    arguments = ["replay", str(long), "--out", str(new), "--set", "learner.lr=2e-2"]
    process = subprocess.Popen([sys.executable, "-m", "workers.cli", *arguments], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (new / "rollouts.db").exists():
        time.sleep(0.01)
    while time.monotonic() < deadline and process.poll() is None and len(hashes(new)) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stood = len(hashes(new))
    assert stood >= 3
    assert replay(Request(str(long), overrides=["learner.lr=2e-2"], out=str(new), resume=True), []) == 0
    assert len(hashes(new)) == 30
    assert [row["step"] for row in read_metrics(new).steps] == list(range(1, 31))
    assert replay(Request(str(new)), []) == 0
    assert not list((new / "checkpoints").glob(".step-*"))


def test_what_is_planned_is_trained_too_and_a_step_without_groups_trains_nothing(copy: Path, tmp_path: Path) -> None:
    change(
        copy, "DELETE FROM steps", "DELETE FROM plan WHERE step = 2", "DELETE FROM plan WHERE step = 3 AND position > 0"
    )
    change(copy, "UPDATE groups SET status = 'waiting', step = NULL WHERE status = 'trained'")
    assert replay(Request(str(copy), out=str(tmp_path / "new")), []) == 0
    got = hashes(tmp_path / "new")
    assert got[0] == got[1] != got[2] != got[3]
    with Log.open(tmp_path / "new" / "rollouts.db") as log:
        assert [row.metrics["updates"] for row in log.steps()] == [2, 0, 1, 2]
        assert log.counts()["train", "trained"][0] == 2 * GROUPS + 1
    assert replay(Request(str(tmp_path / "new")), []) == 0


# --- compare ---------------------------------------------------------------------------------------------------------


def compared(first: Path, second: Path, picture: Path) -> str:
    screen = io.StringIO()
    compare(str(first), str(second), str(picture), Console(file=screen, width=120, highlight=False))
    return screen.getvalue()


def test_two_runs_are_compared(run: Path, tmp_path: Path) -> None:
    new, picture = tmp_path / "new", tmp_path / "curves.png"
    changed = ["objective.clip_high=0.9", "learner.lr=3e-2"]
    assert replay(Request(str(run), last=3, overrides=changed, out=str(new)), []) == 0
    said = compared(run, new, picture)
    for line in (
        "weights: step 1 is the first whose hashes differ", "steps: A has 4, B has 3", "config objective.clip_high: A 0.28, B 0.9",
        "held-out accuracy after step 0: A 0.5, B not measured", "mean difference", "kl_behaviour",
    ):  # fmt: skip
        assert line in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "weights: equal after every one of 4 steps" in compared(run, run, picture)
    with pytest.raises(ReplayError, match="cannot be written"):
        compared(run, new, tmp_path / "missing" / "curves.png")


def test_at_most_twenty_steps_of_many_are_listed() -> None:
    steps = list(range(1, 1001))
    shown = spread(steps, 20)
    assert (len(shown), shown[0], shown[-1]) == (20, 1, 1000)
    assert max(b - a for a, b in itertools.pairwise(shown)) <= 53
    assert spread([3, 7], 20) == [3, 7]
