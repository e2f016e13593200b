"""metrics.jsonl and TensorBoard: nothing twice, nothing lost, across a kill at any byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.metrics import EVENTS, FILE, MetricsError, MetricsWriter, read_events, read_metrics


def tensorboard_points(run_dir: Path) -> list[tuple[str, int, float]]:
    events = [event for path in sorted((run_dir / EVENTS).iterdir()) for event in read_events(path)]
    return [(value.tag, event.step, value.simple_value) for event in events for value in event.summary.value]


def test_steps_and_evaluations_come_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    assert writer.evaluation(0, {"accuracy": 0.25}, at=1.0)
    assert writer.step(1, {"loss": 0.5, "accuracy": 0.5}, at=2.0)
    writer.close()
    history = read_metrics(tmp_path)
    assert history.steps == [{"step": 1, "time": 2.0, "loss": 0.5, "accuracy": 0.5}]
    assert history.evals == [{"eval_step": 0, "time": 1.0, "accuracy": 0.25}]
    assert tensorboard_points(tmp_path) == [
        ("eval/accuracy", 0, 0.25), ("train/loss", 1, 0.5), ("train/accuracy", 1, 0.5),
    ]  # fmt: skip


def test_a_run_without_metrics_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path).steps == []


def test_tensorboard_itself_reads_the_events(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(3, {"loss": 0.5})
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(tmp_path / EVENTS)).Reload()
    # TensorBoard turns plain values into tensors as it loads them, as for PyTorch's own writer.
    (point,) = accumulator.Scalars("train/loss")
    assert (point.step, point.value) == (3, 0.5)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 200), lost_events=st.integers(0, 3))
def test_a_resume_completes_both_files_without_repeating(
    tmp_path_factory: pytest.TempPathFactory, cut: int, lost_events: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    first = MetricsWriter(run_dir)
    for step in (1, 2, 3):
        first.step(step, {"loss": step / 2})
    first.close()
    path = run_dir / FILE
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - cut)])  # killed while writing a line
    (events,) = (run_dir / EVENTS).iterdir()
    events.write_bytes(events.read_bytes()[: events.stat().st_size - 20 * lost_events])
    second = MetricsWriter(run_dir)
    for step in (1, 2, 3, 4):
        second.step(step, {"loss": step / 2})
    assert not second.step(4, {"loss": 9.0})
    second.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(run_dir).steps] == [(s, s / 2) for s in (1, 2, 3, 4)]
    assert sorted(tensorboard_points(run_dir)) == [("train/loss", s, s / 2) for s in (1, 2, 3, 4)]


def test_a_cut_last_line_is_left_out_by_the_reader(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"step": 1, "time": 0}\n{"step": 2, "ti')
    assert [row["step"] for row in read_metrics(tmp_path).steps] == [1]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"steps": 2}', '{"step": "two"}'])
def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path, line: str) -> None:
    (tmp_path / FILE).write_text(f'{{"step": 1, "time": 0}}\n{line}\n{{"step": 2, "time": 0}}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.step(1, {"ratio": float("nan"), "kl": float("inf"), "loss": 1.0})
    writer.close()
    row = json.loads((tmp_path / FILE).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["ratio"] is None
    assert row["kl"] is None
    assert [tag for tag, _, _ in tensorboard_points(tmp_path)] == ["train/loss"]


def test_it_imports_neither_torch_nor_tensorflow() -> None:
    code = (
        "import sys, workers.metrics; print(sorted({'torch', 'tensorflow'} & {m.split('.')[0] for m in sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
