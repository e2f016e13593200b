"""The experiments in `tools/experiments`: the task's answers, the arms' settings, and the tables made of stored figures."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engine.answers import extract
from engine.config import load_config
from tools.experiments import picture, running_total
from tools.experiments.__main__ import BASE, COLD_START, main, report
from tools.experiments.arms import SETS, Arm, differences
from tools.experiments.figures import Curve, Measured, measured, over_seeds, summarize
from tools.experiments.runs import Experiment, RunFailed
from workers.check import problems
from workers.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"([a-z])(\d)(\d)\+(\d)(\d)=(\d)(\d)")


@pytest.fixture(autouse=True)
def at_the_root() -> Iterator[None]:
    """Paths in configs are relative to the repository."""
    with contextlib.chdir(ROOT):
        yield


# --- the task --------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_a_plain_computation() -> None:
    for row in running_total.problems(500, 3, shortest=9, longest=21):
        start, step, first = re.fullmatch(r"(\d\d)\+(\d\d),([a-z]):", row.prompt).groups()  # type: ignore[union-attr]
        times = ord(first) - ord("a") + 1
        digits = [(int(s) + times * int(k)) % 10 for s, k in zip(start, step, strict=True)]
        assert row.answer == f"{digits[0]}{digits[1]}"
        assert extract(row.solution, "last-line") == row.answer


def test_each_line_follows_from_the_one_before() -> None:
    for row in running_total.problems(200, 4, shortest=9, longest=21):
        *lines, answer = row.solution.split("\n")
        distinct = [line for number, line in enumerate(lines) if number == 0 or line != lines[number - 1]]
        total, step = row.prompt[:2], row.prompt[3:5]
        for letter, line in zip(reversed("abcdefghijklmnopqrstuvwxyz"[: len(distinct)]), distinct, strict=True):
            found = LINE.fullmatch(line)
            assert found is not None
            assert found[1] == letter
            assert found[2] + found[3] == total
            assert found[4] + found[5] == step
            assert all((int(found[i]) + int(found[i + 2])) % 10 == int(found[i + 4]) for i in (2, 3))
            total = found[6] + found[7]
        assert distinct[0][0] == row.prompt[6]
        assert answer == total


def test_rows_are_a_function_of_the_seed_and_distinct() -> None:
    rows = running_total.problems(300, 7, shortest=9, longest=21)
    assert rows == running_total.problems(300, 7, shortest=9, longest=21)
    assert rows != running_total.problems(300, 8, shortest=9, longest=21)
    assert len({row.prompt for row in rows}) == 300
    first = running_total.problems(1, 0, shortest=9, longest=21)[0]
    assert (first.prompt, first.answer) == ("75+42,s:", "33")  # in every Python


def test_lengths_vary_and_reach_the_limit() -> None:
    """The overlong rungs need responses that are too long, and enough that are not."""
    limit = load_config(BASE).generator.sampling.max_tokens  # type: ignore[union-attr]
    lengths = sorted(len(row.solution) + 1 for row in running_total.problems(2000, 0, shortest=9, longest=21))
    assert lengths[1000] >= 150
    assert 0.05 < sum(length > limit for length in lengths) / 2000 < 0.3


def test_rows_use_the_models_alphabet_and_fit() -> None:
    model = load_config(COLD_START).model
    for row in running_total.problems(500, 1, shortest=9, longest=21):
        assert set(row.prompt + row.solution) <= set(model.alphabet)  # type: ignore[union-attr]
        assert len(row.prompt) <= load_config(BASE).buffer.prompt_tokens


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="start 100"):
        running_total.problem(100, 0, [False])
    with pytest.raises(ValueError, match="27 lines"):
        running_total.problem(0, 0, [False] * 27)
    with pytest.raises(ValueError, match="at most 10000"):
        running_total.problems(10_001, 0, shortest=3, longest=3)


def test_a_written_file_is_read_as_a_task(tmp_path: Path) -> None:
    from engine.tasks import Source

    running_total.main(tmp_path / "rows.jsonl", count=400)
    config = load_config(COLD_START, [f'tasks.0.path="{tmp_path / "rows.jsonl"}"'])
    row = Source(config.tasks, 0)[0]
    assert row.solution is not None
    assert extract(row.solution, "last-line") == json.loads(row.answer)["answer"]


# --- the arms --------------------------------------------------------------------------------------------------------

LADDER = {
    "grpo": {},
    "plus-overlong-filter": {"objective.overlong_filter": (False, True)},
    "plus-clip-higher": {"objective.clip_high": (0.2, 0.28)},
    "plus-soft-overlong": {
        "reward.overlong": (None, None),
        "reward.overlong.max_length": (None, 240),
        "reward.overlong.cache": (None, 32),
    },
    "plus-token-loss": {"objective.loss": ("sequence", "token")},
    "plus-dynamic-sampling": {"buffer.dynamic_sampling": (False, True)},
}


def test_the_base_is_naive_grpo() -> None:
    config = load_config(BASE)
    objective = config.objective
    assert objective.__struct_config__.tag == "dapo"
    assert (objective.clip_low, objective.clip_high, objective.loss, objective.overlong_filter) == (
        0.2,
        0.2,
        "sequence",
        False,
    )  # type: ignore[union-attr]
    assert config.reward.overlong is None
    assert not config.buffer.dynamic_sampling


def test_each_rung_differs_from_the_one_below_in_its_own_setting() -> None:
    arms = SETS["ladder"](load_config(BASE))
    assert [arm.name for arm in arms] == list(LADDER)
    before = Arm("base")
    for arm in arms:
        changed = {key: pair for key, pair in differences(BASE, arm, before).items() if pair != (None, None)}
        assert changed == {key: pair for key, pair in LADDER[arm.name].items() if pair != (None, None)}
        before = arm


def test_critic_arms_differ_in_pretraining_and_lambdas() -> None:
    base = load_config(BASE)
    arms = {arm.name: arm for name in ("components", "lambda") for arm in SETS[name](base)}
    change = differences(BASE, arms["ppo-pretrained"], arms["ppo"])
    assert change == {"critic.pretrain_steps": (0, arms["vcppo"].pretrain)}
    assert differences(BASE, arms["vcppo"], arms["ppo-pretrained"]) == {"objective.lam_critic": (0.95, 1.0)}
    for lam, name in ((0.9, "vcppo-0.9"), (0.99, "vcppo-0.99"), (1.0, "vcppo-1")):
        assert differences(BASE, arms[name], arms["vcppo"]) == {"objective.lam_actor": (0.95, lam)}


@pytest.mark.parametrize("table", SETS)
def test_arms_share_all_but_the_objective_the_critic_and_the_reward(table: str) -> None:
    for arm in SETS[table](load_config(BASE)):
        keys = {key.partition(".")[0] for key in differences(BASE, arm, Arm("base"))}
        assert keys <= {"objective", "critic", "reward", "buffer"}
        assert arm.needs_critic == ("critic" in keys)


def test_arms_start_from_the_cold_start(tmp_path: Path) -> None:
    experiment = Experiment(BASE, COLD_START, tmp_path, 40)
    for arm in (arm for table in SETS.values() for arm in table(load_config(BASE))):
        config = experiment.run(arm, 3).config
        assert config.model.path.startswith(str(tmp_path / "cold-start" / "checkpoints"))  # type: ignore[union-attr]
        assert (config.seed, config.steps, config.name) == (3, 40 + arm.pretrain, f"{arm.name}-s3")
        assert not config.cold_start
        assert problems(config) == []


def test_commands_say_what_is_run(tmp_path: Path) -> None:
    command = Experiment(BASE, COLD_START, tmp_path, 40).run(SETS["ladder"](load_config(BASE))[1], 0).command
    assert command.startswith("headrace launch configs/running-total.toml --set ")
    assert "objective.overlong_filter=true" in command


def test_a_run_that_cannot_start_is_named_with_its_words(tmp_path: Path) -> None:
    experiment = Experiment(BASE, COLD_START, tmp_path, 40)  # there is no cold start
    run = experiment.run(SETS["ladder"](load_config(BASE))[0], 0)
    with pytest.raises(RunFailed, match=r"(?s)grpo-s0: exit code 2; .*cold-start"):
        run.execute()
    assert not run.done


# --- the table -------------------------------------------------------------------------------------------------------


def _stored(folder: Path, accuracies: list[float], *, pretrain: int = 0) -> Path:
    """A run's metrics file: an evaluation every 10 steps, the first after the critic-only ones."""
    writer = MetricsWriter(folder)
    writer.evaluation(0, {"accuracy": 0.0, "length_mean": 100.0}, at=1000.0)
    for number, accuracy in enumerate(accuracies):
        writer.evaluation(pretrain + 10 * number, {"accuracy": accuracy, "length_mean": 150.0 + number}, at=1000.0)
    for step in range(1, pretrain + 10 * len(accuracies) - 9):
        figures = {"entropy": 5.0 if step <= pretrain else 0.2, "length_mean": 160.0, "total_tokens": 1000.0 * step}
        writer.step(step, figures, at=1000.0 + step)
    writer.close()
    return folder


def test_figures_of_a_run(tmp_path: Path) -> None:
    run = measured(_stored(tmp_path, [0.3, 0.7, 0.6], pretrain=20), seed=1, command="c", pretrain=20)
    assert run.accuracy == Curve([0, 10, 20], [0.3, 0.7, 0.6])
    assert run.length.values == [150.0, 151.0, 152.0]
    assert run.entropy.steps == list(range(1, 21))
    assert set(run.entropy.values) == {0.2}
    assert run.generated_tokens == 40_000.0


def test_a_policy_that_has_not_moved_yet_starts_as_it_was_measured_last(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step, accuracy in ((0, 0.3), (10, 0.4), (20, 0.5), (25, 0.6)):
        writer.evaluation(step, {"accuracy": accuracy, "length_mean": 1.0}, at=1000.0)
    writer.step(25, {"entropy": 0.2, "length_mean": 1.0, "total_tokens": 1.0}, at=1000.0)
    writer.close()
    assert measured(tmp_path, seed=0, command="c", pretrain=15).accuracy == Curve([0, 5, 10], [0.4, 0.5, 0.6])


def test_summaries_are_over_seeds_and_gains_paired(tmp_path: Path) -> None:
    def run(name: str, seed: int, *accuracies: float) -> Measured:
        return measured(_stored(tmp_path / f"{name}{seed}", list(accuracies)), seed=seed, command="c", pretrain=0)

    plain = [run("a", 0, 0.2, 0.5, 0.4), run("a", 1, 0.4, 0.6, 0.8)]
    better = [run("b", 1, 0.4, 0.9, 0.9)]
    first, second = summarize([("a", "x", plain), ("not run", "y", []), ("b", "z", better)])
    assert first.end.mean == pytest.approx(0.6)
    assert first.end.deviation == pytest.approx(0.2828, abs=1e-4)
    assert first.best.mean == pytest.approx(0.65)
    assert first.gain is None
    assert (second.arm, second.seeds, second.end.deviation) == ("b", [1], None)
    assert second.gain is not None
    assert second.gain.mean == pytest.approx(0.1)  # against seed 1 alone
    console = Console(width=150, record=True)
    console.print(picture.table("t", [first, second]))
    text = console.export_text()
    assert "60.0 ± 28.3" in text
    assert "+10.0" in text


def test_curves_of_unequal_length_are_averaged_where_they_are() -> None:
    points = over_seeds([Curve([0, 10], [0.2, 0.4]), Curve([0], [0.4])])
    assert [(step, round(spread.mean, 6), spread.deviation is None) for step, spread in points] == [
        (0, 0.3, False),
        (10, 0.4, True),
    ]


def test_a_report_without_any_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = Experiment(BASE, COLD_START, tmp_path, 40)
    report(experiment, "components", SETS["components"](load_config(BASE)), [0, 1])
    assert "not run yet: grpo, ppo, ppo-pretrained, vcppo" in capsys.readouterr().out
    document = json.loads((tmp_path / "components.json").read_text(encoding="utf-8"))
    assert document["arms"]["vcppo"]["runs"] == []
    assert (tmp_path / "components.png").stat().st_size > 1000


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["stairs"])
    assert exit.value.code == 2
    assert main(["ladder", "--report", "--runs", str(tmp_path), "--set", "learner.speed=1"]) == 2
    assert "speed" in capsys.readouterr().err
