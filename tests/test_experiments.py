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
from tools.experiments import guessed_total, picture, running_total
from tools.experiments.__main__ import main
from tools.experiments.arms import GUESSED, RUNNING, SETS, Arm, differences
from tools.experiments.figures import Curve, Measured, measured, over_seeds, summarize
from tools.experiments.runs import Experiment, RunFailed
from workers.check import problems
from workers.metrics import MetricsWriter

BASE, COLD_START = RUNNING.base, RUNNING.starts[0]
CRITIC = Path("critic")
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


def test_guesses_spoil_a_computation_and_all_else_is_right() -> None:
    rows, guessed = guessed_total.problems(400, 3, shortest=13, longest=21), 0
    for row in rows:
        *lines, answer = row.solution.split("\n")
        total, step = row.prompt[:2], row.prompt[3:5]
        letters = [chr(ord(row.prompt[6]) - number) for number in range(len(lines))]
        for number, (letter, line) in enumerate(zip(letters, lines, strict=True)):
            assert line[:6] == f"{letter}{total}+{step}"
            if line[6] == "=":
                assert line[7:9] == "".join(str((int(a) + int(b)) % 5) for a, b in zip(total, step, strict=True))
            else:
                assert (line[6], number < guessed_total.EARLY) == ("?", True)
            total = line[7:9]
            assert line[9:] in guessed_total.FREE
        assert (letters[-1], answer) == ("a", total)
        assert answer == row.answer or "?" in row.solution
        guessed += "?" in row.solution
    assert 0.5 < guessed / len(rows) < 0.65


def test_guessed_rows_are_long_and_fit() -> None:
    rows, config = guessed_total.problems(400, 5, shortest=13, longest=21), load_config(GUESSED.base)
    lengths = sorted(len(row.solution) + 1 for row in rows)
    assert lengths[len(rows) // 2] >= 150
    assert lengths[-1] <= config.generator.sampling.max_tokens  # type: ignore[union-attr]
    assert rows == guessed_total.problems(400, 5, shortest=13, longest=21)
    for row in rows:
        assert set(row.prompt + row.solution) <= set(config.model.alphabet)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="27 lines"):
        guessed_total.problem((0, 0), (1, 1), [guessed_total.Line(None, "a")] * 27)
    with pytest.raises(ValueError, match="at most 625"):
        guessed_total.problems(626, 0, shortest=3, longest=3)


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
    arms = SETS["ladder"].arms(load_config(BASE), CRITIC)
    assert [arm.name for arm in arms] == list(LADDER)
    before = Arm("base")
    for arm in arms:
        changed = {key: pair for key, pair in differences(BASE, arm, before).items() if pair != (None, None)}
        assert changed == {key: pair for key, pair in LADDER[arm.name].items() if pair != (None, None)}
        before = arm


def test_critic_arms_differ_in_pretraining_and_lambdas() -> None:
    path, base = GUESSED.base, load_config(GUESSED.base)
    arms = {arm.name: arm for name in ("components", "lambda") for arm in SETS[name].arms(base, CRITIC)}
    assert differences(path, arms["ppo-pretrained"], arms["ppo"]) == {"critic.path": (None, "critic")}
    assert differences(path, arms["vcppo"], arms["ppo-pretrained"]) == {"objective.lam_critic": (0.95, 1.0)}
    for lam, name in ((0.9, "vcppo-0.9"), (0.99, "vcppo-0.99"), (1.0, "vcppo-1")):
        assert differences(path, arms[name], arms["vcppo"]) == {"objective.lam_actor": (0.95, lam)}


@pytest.mark.parametrize("table", SETS)
def test_arms_share_all_but_the_objective_the_critic_and_the_reward(table: str) -> None:
    base = SETS[table].task.base
    for arm in SETS[table].arms(load_config(base), CRITIC):
        keys = {key.partition(".")[0] for key in differences(base, arm, Arm("base"))}
        assert keys <= {"objective", "critic", "reward", "buffer"}
        assert arm.needs_critic == ("critic" in keys)


@pytest.mark.parametrize("table", SETS)
def test_arms_start_from_the_cold_start_and_its_critic(table: str, tmp_path: Path) -> None:
    comparison = SETS[table]
    experiment = Experiment(comparison.task, tmp_path, 40)
    policies = [f"{run.config.run_dir}/checkpoints/step-{run.config.steps:06d}" for run in experiment.cold]
    starts = [run.config.model.path for run in experiment.cold[1:]]  # type: ignore[union-attr]
    assert starts == policies[:-1]
    for arm in comparison.arms(load_config(comparison.task.base), experiment.critic_folder):
        config = experiment.run(arm, 3).config
        assert config.model.path == policies[-1]  # type: ignore[union-attr]
        assert (config.seed, config.steps, config.name, config.cold_start) == (3, 40, f"{arm.name}-s3", "")
        if arm.pretrained:
            assert config.critic is not None
            assert config.critic.path == str(experiment.critic_folder)
        assert problems(config) == []


def test_the_critic_is_pretrained_on_the_starting_policys_log(tmp_path: Path) -> None:
    experiment = Experiment(GUESSED, tmp_path, 40)
    collect, pretraining = experiment.critic
    assert f'path = "{tmp_path}/cold-start-2/checkpoints/step-000100"' in collect.command
    assert pretraining.command == f"headrace pretrain-critic {tmp_path}/collect"
    with pytest.raises(RunFailed, match=r"(?s)pretrain-critic: exit code 2; .*no such run"):
        pretraining.execute()
    assert not pretraining.done
    assert Experiment(RUNNING, tmp_path, 40).critic == []


def test_commands_say_what_is_run(tmp_path: Path) -> None:
    command = Experiment(RUNNING, tmp_path, 40).run(SETS["ladder"].arms(load_config(BASE), CRITIC)[1], 0).command
    assert command.startswith("headrace launch configs/running-total.toml --set ")
    assert "objective.overlong_filter=true" in command


def test_a_run_that_cannot_start_is_named_with_its_words(tmp_path: Path) -> None:
    experiment = Experiment(RUNNING, tmp_path, 40)  # there is no cold start
    run = experiment.run(SETS["ladder"].arms(load_config(BASE), CRITIC)[0], 0)
    with pytest.raises(RunFailed, match=r"(?s)grpo-s0: exit code 2; .*cold-start"):
        run.execute()
    assert not run.done


# --- the table -------------------------------------------------------------------------------------------------------


def _stored(folder: Path, accuracies: list[float]) -> Path:
    """A run's metrics file: an evaluation every 10 steps."""
    writer = MetricsWriter(folder)
    for number, accuracy in enumerate(accuracies):
        writer.evaluation(10 * number, {"accuracy": accuracy, "length_mean": 150.0 + number}, at=1000.0)
    for step in range(1, 10 * len(accuracies) - 9):
        figures = {"entropy": 0.2, "length_mean": 160.0, "total_tokens": 1000.0 * step}
        writer.step(step, figures, at=1000.0 + step)
    writer.close()
    return folder


def test_figures_of_a_run(tmp_path: Path) -> None:
    run = measured(_stored(tmp_path, [0.3, 0.7, 0.6]), seed=1, command="c")
    assert run.accuracy == Curve([0, 10, 20], [0.3, 0.7, 0.6])
    assert run.length.values == [150.0, 151.0, 152.0]
    assert run.entropy == Curve(list(range(1, 21)), [0.2] * 20)
    assert run.generated_tokens == 20_000.0


def test_summaries_are_over_seeds_and_gains_paired(tmp_path: Path) -> None:
    def run(name: str, seed: int, *accuracies: float) -> Measured:
        return measured(_stored(tmp_path / f"{name}{seed}", list(accuracies)), seed=seed, command="c")

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
    assert main(["components", "--report", "--runs", str(tmp_path), "--seeds", "0", "1"]) == 0
    assert "not run yet: grpo, ppo, ppo-pretrained, vcppo" in capsys.readouterr().out
    document = json.loads((tmp_path / "components.json").read_text(encoding="utf-8"))
    assert document["arms"]["vcppo"]["runs"] == []
    assert document["beforehand"][-1].startswith("headrace pretrain-critic ")
    assert (tmp_path / "components.png").stat().st_size > 1000


def test_the_command_line_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["stairs"])
    assert exit.value.code == 2
    assert main(["ladder", "--report", "--runs", str(tmp_path), "--set", "learner.speed=1"]) == 2
    assert "speed" in capsys.readouterr().err
