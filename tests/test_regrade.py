"""A stored run through another reward: the same responses, new grades, a new plan; nothing half-made is left behind."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from replayed_run import GROUPS, SAMPLES, Maker, contents, make_run
from rich.console import Console

from engine.config import ConfigError
from protocols.log import Log
from workers.regrade import regrade
from workers.replay import Request, replay
from workers.replay_source import ReplayError
from workers.reward_watch import RewardsBroken
from workers.scorer import ScorerError


@pytest.fixture(autouse=True)
def where_the_rewards_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups: 0 evaluation, 1 all right, then of each step one all wrong and three that are trained."""
    return make_run(tmp_path_factory.mktemp("regrade") / "trial")


def graded(run: Path, out: Path, *settings: str, reward: str | None = None) -> str:
    screen = io.StringIO()
    regrade(str(run), str(out), reward=reward, overrides=list(settings), console=Console(file=screen, width=200))
    return screen.getvalue()


def statuses(folder: Path) -> dict[int, tuple[str, str | None]]:
    with Log.open(folder / "rollouts.db") as log:
        return {row.group: (row.status, row.reason) for row in log.groups()}


def test_the_same_reward_changes_nothing(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    said = graded(run, tmp_path / "new")
    assert contents(run) == before
    assert f"{6 + 16 * SAMPLES} responses graded anew, 0 of them otherwise" in said
    assert "plan: 12 groups in 4 of 4 steps; 12 stay in their step, 0 leave it, 0 come in" in said
    assert "held-out accuracy after step 0: 0.500 before, 0.500 after" in said
    with Log.open(run / "rollouts.db") as old, Log.open(tmp_path / "new" / "rollouts.db") as log:
        for step in range(1, 5):
            groups = old.plan(step) or []
            assert log.plan(step) == groups
            a, b = old.batch(step, groups), log.batch(step, groups)
            assert all(
                (getattr(a, name) == getattr(b, name)).all() for name in ("tokens", "versions", "rewards", "correct")
            )
        assert (log.last_step(), log.meta.origin.how) == (0, "regrade")  # type: ignore[union-attr]
    assert statuses(tmp_path / "new")[1] == ("dropped", "all correct")
    assert replay(Request(str(tmp_path / "new"), out=str(tmp_path / "trained")), []) == 0
    with Log.open(run / "rollouts.db") as old, Log.open(tmp_path / "trained" / "rollouts.db") as log:
        assert [row.weights_hash for row in log.steps()] == [row.weights_hash for row in old.steps()]


def test_another_reward_decides_and_plans_anew(run: Path, tmp_path: Path) -> None:
    said = graded(run, tmp_path / "new", reward="regrade_functions:longer_than_three")
    with Log.open(tmp_path / "new" / "rollouts.db") as log:
        plans = {step: log.plan(step) or [] for step in range(1, 5)}
        for step, groups in plans.items():
            for group in groups:
                assert {grade.correct for grade in log.grades(group)} == {True, False}
                versions = {version for rollout in log.rollouts(group) for version, _ in rollout.versions}
                assert max(versions) + 1 == step
        for group, (status, reason) in statuses(tmp_path / "new").items():
            right = [grade.correct for grade in log.grades(group)]
            if status == "dropped":
                assert reason == ("all correct" if all(right) else "all wrong")
    came = {group for groups in plans.values() for group in groups} & {2, 6, 10, 14}
    assert came == {2, 6, 10, 14}, "a group that was all wrong goes to the first step after its weights"
    assert [groups[-1] for groups in plans.values()] == [2, 6, 10, 14], "behind those that were there"
    assert statuses(tmp_path / "new")[1] == ("dropped", "all wrong")
    for line in (
        "wrong -> right: ",
        "right -> wrong: ",
        "mean reward: ",
        "example: group ",
        "groups dropped before, informative now: 4",
    ):
        assert line in said
    assert replay(Request(str(tmp_path / "new"), out=str(tmp_path / "trained")), []) == 0
    assert replay(Request(str(tmp_path / "trained")), []) == 0


def test_settings_shape_the_new_rewards(run: Path, tmp_path: Path) -> None:
    graded(run, tmp_path / "new", "reward.right=5", "reward.wrong=0", "reward.overlong={max_length = 6, cache = 3}")
    with Log.open(tmp_path / "new" / "rollouts.db") as log:
        for row in log.groups():
            lengths = {rollout.sample: len(rollout.tokens) for rollout in log.rollouts(row.group)}
            for grade in log.grades(row.group):
                penalty = -min(max((lengths[grade.sample] - 3) / 3, 0), 1)
                assert grade.reward == pytest.approx((5 if grade.correct else 0) + penalty)


def test_groups_on_their_way_are_left_out_and_late_ones_are_not_planned(tmp_path: Path) -> None:
    made = Maker(tmp_path / "live")
    made.step(1)
    ready = made.group([True, False, False, False], version=0)
    late = made.group([True, False, False, False], version=1)
    planned = made.plan(2)
    later = made.group([True, False, False, False], version=2)
    open_group = made.group([True, False], missing=1)
    folder = made.close()
    said = graded(folder, tmp_path / "new")
    with Log.open(tmp_path / "new" / "rollouts.db") as log:
        assert log.group(open_group) is None
        assert (log.plan(1) or [])[GROUPS:] == [ready]
        assert log.plan(2) == [*planned, late]
        assert log.group(later).status == "waiting"  # type: ignore[union-attr]
    assert "1 informative groups came too late for every step" in said


def test_attempts_that_fail_are_repeated_and_kept(run: Path, tmp_path: Path) -> None:
    said = graded(run, tmp_path / "new", reward="regrade_functions:raises_on_long")
    with Log.open(tmp_path / "new" / "rollouts.db") as log:
        failed = [grade for row in log.groups() for grade in log.grades(row.group) if grade.verdict != "graded"]
        assert failed
        assert {(grade.verdict, grade.attempt) for grade in failed} == {("crash", 0), ("crash", 1)}
    assert "-> crash: " in said


@pytest.mark.parametrize(
    ("settings", "reward", "error", "said"),
    [
        ([], "regrade_functions:no_such_function", ScorerError, "no_such_function"),
        ([], "regrade_functions:raises", RewardsBroken, "the reward cannot grade"),
        (
            ["tasks.0.path=other.jsonl"],
            None,
            ReplayError,
            "it has groups of task words, the config has other; --reward",
        ),
        (["reward.right=-2"], None, ConfigError, "reward.right = -2.0 is not more than reward.wrong"),
    ],
)
def test_a_regrade_that_cannot_be_done_leaves_nothing(
    run: Path, tmp_path: Path, settings: list[str], reward: str | None, error: type[Exception], said: str
) -> None:
    before = contents(run)
    with pytest.raises(error, match=said):
        graded(run, tmp_path / "new", *settings, reward=reward)
    assert not list(tmp_path.iterdir())
    assert contents(run) == before


def test_an_old_run_is_never_overwritten(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with pytest.raises(ReplayError, match="new: exists already; expected a new folder"):
        graded(run, tmp_path / "new")
