"""`show` and `export`: a stored run as people and other programs read it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from stored_run import fill_group, group_row, new_log, rollout, small_run

from protocols.log import Log
from workers.inspect import InspectError, export, show

REQUIRED = {
    "group", "sample", "prompt_id", "task", "group_status", "reason", "step", "reward", "correct", "verdict", "finish",
    "prompt_tokens", "response_tokens", "version_min", "version_max", "prompt_text", "response_text",
}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trial"
    small_run(folder)
    return folder


def shown(run: Path, *, group: int | None = None, step: int | None = None) -> str:
    screen = io.StringIO()
    show(run, group=group, step=step, console=Console(file=screen, width=140))
    return screen.getvalue()


def test_export_has_one_row_a_response_in_both_formats(run_dir: Path, tmp_path: Path) -> None:
    assert export(run_dir, tmp_path / "a.parquet") == export(run_dir / "rollouts.db", tmp_path / "a.jsonl") == 16
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{**row, "parts": row["parts"] and json.loads(row["parts"])} for row in table] == lines
    assert table[0].keys() >= REQUIRED
    by_sample = {(row["group"], row["sample"]): row for row in table}
    assert len(by_sample) == len(table)
    status = {group: (row["group_status"], row["reason"], row["step"]) for (group, _), row in by_sample.items()}
    assert status == {
        0: ("dropped", "evaluation", None), 1: ("trained", None, 1), 2: ("trained", None, 1), 3: ("waiting", None, None),
        4: ("waiting", None, None), 5: ("dropped", "all wrong", None),
        6: ("failed", "2 of 2 samples could not be graded", None), 7: ("waiting", None, None),
    }  # fmt: skip
    row = by_sample[1, 1]
    assert (row["reward"], row["correct"], row["verdict"], row["parts"]) == (-1.5, False, "graded", '{"right":0.0}')
    assert (row["prompt_text"], row["response_text"], row["prompt_tokens"], row["response_tokens"]) == (
        "1 + 1 =",
        "4",
        4,
        5,
    )
    assert (row["kind"], row["worker"], row["started_at"], row["finished_at"]) == ("train", "gen-1", 1001.0, 1003.0)
    failed, open_sample, second_try = by_sample[6, 0], by_sample[7, 2], by_sample[7, 0]
    assert (failed["reward"], failed["correct"], failed["verdict"]) == (None, None, "timeout")
    assert (open_sample["reward"], open_sample["verdict"], open_sample["finish"]) == (None, None, "length")
    assert (open_sample["version_min"], open_sample["version_max"]) == (0, 1)
    assert (second_try["reward"], second_try["correct"], second_try["verdict"]) == (1.0, True, "graded")


def test_export_of_a_run_that_is_written_meanwhile(tmp_path: Path) -> None:
    with new_log(tmp_path / "live") as log:
        for group in range(700):
            fill_group(log, group, [True, False])
        log.commit()
        fill_group(log, 700, [True, False])
        assert export(tmp_path / "live", tmp_path / "a.jsonl") == 1400, "more than one page, nothing uncommitted"
        log.commit()
        assert export(tmp_path / "live", tmp_path / "a.jsonl") == 1402, "an older export is replaced"


def test_export_of_a_run_without_responses(tmp_path: Path) -> None:
    new_log(tmp_path / "new").close()
    assert export(tmp_path / "new", tmp_path / "a.parquet") == 0
    assert set(pq.read_schema(tmp_path / "a.parquet").names) >= REQUIRED


@pytest.mark.parametrize("name", ["a.csv", "a", "missing/a.jsonl", "missing/a.parquet"])
def test_export_that_cannot_be_written_is_one_error(run_dir: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InspectError, match=name):
        export(run_dir, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_show_group(run_dir: Path) -> None:
    text = shown(run_dir, group=2)
    for said in ("trained in step 1", "2 + 1 =", '{"answer": "3"}', "sample 0: right, reward 1", "sample 1: wrong, reward -1.5",
                 "version 0: 2 tokens, version 1: 2 tokens", "expected 5", "by gen-1"):  # fmt: skip
        assert said in text, said
    text = shown(run_dir, group=6)
    for said in ("failed: 2 of 2 samples could not be graded", "not graded (timeout)", "[bold]no markup"):
        assert said in text, said
    text = shown(run_dir, group=7)
    for said in (
        "sample 0: right",
        "attempt 0",
        "crash",
        "attempt 1",
        "sample 1: no response yet",
        "sample 2: not graded yet",
    ):
        assert said in text, said
    assert "in the plan of step 2, which is not committed" in shown(run_dir, group=3)


def test_show_step(run_dir: Path) -> None:
    text = shown(run_dir, step=1)
    for said in (
        "hash-1",
        "waited 1.50 s for its groups",
        "2 was ready 4.50 s before the learner was free",
        "sums-2",
        "1/2",
        "loss",
        "0.25",
    ):
        assert said in text, said
    assert text.index("sums-2") < text.index("sums-1"), "training order"
    assert "not committed" in shown(run_dir, step=2)


def test_show_run(run_dir: Path) -> None:
    text = shown(run_dir)
    for said in ("1 of 2 committed", "dropped", "all wrong", "accuracy 0.500 on 1 prompts", "gen-1 joined", "hash-1"):
        assert said in text, said


def test_show_a_run_that_has_just_begun(tmp_path: Path) -> None:
    with new_log(tmp_path / "new") as log:
        assert "0 of 2 committed" in shown(tmp_path / "new")
        log.add_group(group_row(0))
        log.add_rollout("gen-1", rollout(0, 1), 1.0)
        log.commit()
    assert "no response yet" in shown(tmp_path / "new", group=0)


def test_what_is_not_there_is_one_error(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InspectError, match=r"group 99 is not in the log; it has groups 0 to 7"):
        shown(run_dir, group=99)
    with pytest.raises(InspectError, match=r"step 3 is not planned yet; the last committed step is 1"):
        shown(run_dir, step=3)
    with pytest.raises(InspectError, match="expected one of them"):
        shown(run_dir, group=1, step=1)
    with pytest.raises(InspectError, match="no such run: looked for"):
        shown(tmp_path / "nothing")
    (tmp_path / "rollouts.db").write_bytes(b"not a log" * 100)
    with pytest.raises(InspectError, match="not a database"):
        shown(tmp_path)
    with Log.open(run_dir / "rollouts.db") as log:
        assert log.last_step() == 1
