"""An audit finds each violation that is made in a copy of a small log, and nothing in the log as it is."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from audited_run import Served, config_of, make_run

from protocols.log import Log
from workers.audit import CHECKS, audit
from workers.metrics import read_metrics
from workers.run_state import FENCES_PER_START
from workers.worked import worked

TRAINED = "(SELECT min(group_id) FROM plan WHERE step = 2)"
DROPPED = "(SELECT min(id) FROM groups WHERE status = 'dropped')"
FAILED = "(SELECT min(id) FROM groups WHERE status = 'failed')"
EVALUATED = "(SELECT min(id) FROM groups WHERE status = 'evaluated')"
TWICE = """CREATE TABLE copy AS SELECT * FROM {0}; DROP TABLE {0}; ALTER TABLE copy RENAME TO {0};
    INSERT INTO {0} SELECT * FROM {0} WHERE {1} LIMIT 1;"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("audited"))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "trial"))


def change(run: Path, sql: str) -> None:
    connection = sqlite3.connect(run / "rollouts.db", isolation_level=None)
    connection.execute("PRAGMA legacy_alter_table = ON")
    connection.execute("PRAGMA ignore_check_constraints = ON")
    before = connection.total_changes
    connection.executescript(sql)
    assert connection.total_changes > before or "DROP" in sql, f"nothing was changed by: {sql}"
    connection.close()


def found(run: Path) -> dict[str, list[str]]:
    """What is wrong, by check."""
    return {check.name: check.violations for check in audit(run) if check.violations}


def test_a_run_of_every_fate_is_found_right(run: Path) -> None:
    checks = {check.name: check for check in audit(run)}
    assert {name: check.violations for name, check in checks.items() if check.violations} == {}
    assert list(checks) == list(CHECKS)
    with Log.open(run / "rollouts.db") as log:
        fates = {status for (status,) in log.query("SELECT DISTINCT status FROM groups")}
    assert fates >= {"trained", "dropped", "failed", "evaluated"}, "the log has too little to be audited"
    assert checks["plans"].counted.startswith("3 committed steps, 6 groups planned")
    assert "under fences of 2 starts" in checks["fences"].counted
    assert " 0 of them not gradable" not in checks["samples"].counted


@pytest.mark.parametrize(
    ("check", "sql", "text"),
    [
        ("plans", "DELETE FROM steps WHERE step = 2", "step 2 is missing"),
        ("plans", f"DELETE FROM plan WHERE group_id = {TRAINED}", "step 2: its plan has 1 groups, expected 2"),
        ("plans", "UPDATE plan SET position = 5 WHERE step = 1 AND position = 1", "places 0 to 5"),
        ("plans", f"INSERT INTO plan VALUES (7, 0, {DROPPED})", "step 7 is planned, and step 4 comes next"),
        ("trained once", TWICE.format("plan", "step = 2"), "is planned 2 times"),
        ("trained once", f"UPDATE groups SET step = 1 WHERE id = {TRAINED}", "is in the plan of step 2"),
        ("trained once", f"UPDATE groups SET status = 'waiting', step = NULL WHERE id = {TRAINED}", "it is waiting"),
        ("trained once", f"UPDATE groups SET status = 'trained', step = 1 WHERE id = {FAILED}", "whose plan does not have it"),
        ("trained once", f"UPDATE groups SET step = 2 WHERE id = {DROPPED}", "says that step 2 trained it"),
        ("samples", f"DELETE FROM rollouts WHERE sample = 3 AND group_id = {TRAINED}", "has 3 responses, expected 4"),
        ("samples", f"DELETE FROM grades WHERE sample = 3 AND group_id = {TRAINED}", "1 of its 4 responses have no verdict"),
        ("samples", "DELETE FROM grades WHERE verdict = 'timeout' AND attempt = 0", "given up after 1 attempts, expected 2"),
        ("samples", f"UPDATE grades SET verdict = 'crash' WHERE group_id = {TRAINED}", "0 of 4 samples are graded"),
        ("responses", TWICE.format("rollouts", "sample = 1"), "sample 1 has 2 responses"),
        ("responses", TWICE.format("grades", "sample = 1"), "2 verdicts on attempt"),
        ("responses", "UPDATE rollouts SET sample = 9 WHERE id = 3", "no such sample"),
        ("responses", "UPDATE rollouts SET versions = '[[0,1]]' WHERE id = 3", "do not come to the same"),
        ("fences", "UPDATE rollouts SET fence = 0 WHERE id = 2", "fence 0 was never given out"),
        ("fences", f"UPDATE rollouts SET fence = {2 * FENCES_PER_START + 1} WHERE id = 2", "was never given out"),
        ("fences", f"UPDATE rollouts SET fence = {FENCES_PER_START + 1} WHERE id = 2", "is of start 1 of the buffer, taken by start 2"),
        ("fences", "UPDATE rollouts SET worker = 'nobody' WHERE id = 2", "made by nobody, which never joined"),
        ("versions", f"""UPDATE rollouts SET versions = '[[2,' || response_tokens || ']]', version_min = 2, version_max = 2
            WHERE group_id = {TRAINED} AND sample = 0""", "tokens of version 2, and step 2 trains it"),
        ("versions", f"""UPDATE rollouts SET versions = '[[9,' || response_tokens || ']]', version_min = 9, version_max = 9
            WHERE group_id = {DROPPED} AND sample = 0""", "tokens of version 9, and the log has 3 steps"),
        ("dropped", f"UPDATE grades SET correct = 1 - correct WHERE sample = 0 AND group_id = {DROPPED}", "it is informative"),
        ("dropped", f"UPDATE groups SET reason = 'bad luck' WHERE id = {DROPPED}", 'is dropped as "bad luck"'),
        ("dropped", f"DELETE FROM grades WHERE sample = 0 AND group_id = {DROPPED}", "with 4 responses and 3 verdicts of 4"),
        ("dropped", f"UPDATE grades SET verdict = 'graded' WHERE group_id = {FAILED}", "is failed, and 4 of its 4 samples are graded"),
        ("informative", f"UPDATE grades SET correct = 1 WHERE group_id = {TRAINED}", "is planned, and"),
        ("statuses", f"UPDATE groups SET status = 'waiting' WHERE id = {DROPPED}", "is not dropped"),
        ("statuses", f"UPDATE groups SET status = 'waiting' WHERE id = {EVALUATED}", "and is not evaluated"),
        ("statuses", f"UPDATE groups SET status = 'dropped' WHERE id = {EVALUATED}", "of kind eval is dropped"),
        ("statuses", f"DELETE FROM grades WHERE sample = 0 AND group_id = {EVALUATED}", "1 without a verdict"),
        ("prompts", "UPDATE groups SET source_index = 0 WHERE kind = 'train'", "prompt 0 of the stream was drawn as groups"),
        ("prompts", "UPDATE groups SET source_index = 0 WHERE kind = 'eval'", "held-out prompt 0 was asked twice"),
        ("prompts", f"DELETE FROM prompts WHERE group_id = {TRAINED}", "has no prompt"),
        ("database", f"DELETE FROM groups WHERE id = {TRAINED}", "refers to nothing in groups"),
        ("metrics", "UPDATE steps SET metrics = json_set(metrics, '$.loss', 7) WHERE step = 2", "step 2: loss is 1.0, the log has 7"),
        ("checkpoints", "UPDATE steps SET weights_hash = 'another' WHERE step = 3", "the log has another"),
    ],
)  # fmt: skip
def test_a_violation_in_the_log_is_found(run: Path, check: str, sql: str, text: str) -> None:
    change(run, sql)
    violations = found(run)
    assert check in violations, violations
    assert any(text in violation for violation in violations[check]), violations[check]


def without_line(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if not line.startswith('{"step": 2')))


def a_line_too_many(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 1.0}\n{"eval_step": 0, "time": 1.0}\n')


@pytest.mark.parametrize(
    ("check", "act", "texts"),
    [
        ("metrics", without_line, ["step 2 has no line"]),
        ("metrics", a_line_too_many, ["step 4 has a line, and the log does not have it", "eval_step 0 has two lines"]),
        ("metrics", lambda run: (run / "metrics.jsonl").write_text("nonsense\n"), ["line 1: not JSON"]),
        ("checkpoints", lambda run: shutil.rmtree(run / "checkpoints"), ["no checkpoint of the last one"]),
        ("checkpoints", lambda run: (run / "checkpoints" / "step-000009").mkdir(), ["the log has no step 9"]),
    ],
)  # fmt: skip
def test_a_violation_beside_the_log_is_found(
    run: Path, check: str, act: Callable[[Path], object], texts: list[str]
) -> None:
    act(run)
    assert found(run).keys() == {check}
    for text in texts:
        assert any(text in violation for violation in found(run)[check]), found(run)


def test_the_command_prints_a_line_a_check_and_its_exit_code_says_whether_all_is_right(run: Path) -> None:
    command = [sys.executable, "-m", "workers.cli", "audit", str(run)]
    right = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert right.returncode == 0, right.stderr
    assert [line.split("  ")[0] for line in right.stdout.splitlines()[:-1]] == list(CHECKS)
    change(run, "UPDATE rollouts SET fence = 0")
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 1, wrong.stderr
    assert "fence 0 was never given out" in wrong.stdout
    assert " more" in wrong.stdout


def test_a_run_that_goes_on_may_owe_its_last_line(tmp_path: Path) -> None:
    make_run(tmp_path)
    served = Served(config_of(tmp_path, steps=5), resume=True)
    served.serve(until=4)
    run = served.config.run_dir
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if not line.startswith('{"step": 4')))
    live = found(run)
    served.state.close()
    assert live == {}
    assert found(run) == {"metrics": ["step 4 has no line"]}


def test_lines_that_a_buffer_did_not_come_to_write_are_completed_from_the_log(run: Path, made: Path) -> None:
    """Killed between the log's commit and the line: the next process writes it, with the log's figures."""
    whole = read_metrics(made)
    kept = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if '"step": 3' not in line]
    (run / "metrics.jsonl").write_text("".join(line for line in kept if not line.startswith('{"eval_step": 3')))
    assert found(run)["metrics"] == ["step 3 has no line", "eval_step 3 has no line"]
    config = config_of(made.parent)
    change(run, f"UPDATE meta SET value = replace(value, '{made.parent}', '{run.parent}') WHERE key = 'config'")
    Served(config_of(run.parent), resume=True).state.close()
    again = read_metrics(run)
    assert config.steps == 3
    assert [{**row, "time": 0} for row in again.steps] == [{**row, "time": 0} for row in whole.steps]
    assert [{**row, "time": 0} for row in again.evals] == [{**row, "time": 0} for row in whole.evals]
    assert found(run) == {}


def test_the_log_says_whether_a_role_did_work_since_it_was_started(run: Path, tmp_path: Path) -> None:
    log, names = run / "rollouts.db", ("buffer", "learner", "generator-0", "reward-0")
    assert [worked(log, name, 0.0) for name in names] == [True] * 4
    assert [worked(log, name, time.time() + 1) for name in names] == [False] * 4
    assert not worked(log, "generator-1", 0.0)
    assert not worked(tmp_path / "nothing.db", "buffer", 0.0)
    assert json.loads((run / "checkpoints" / "step-000003" / "headrace.json").read_text())["meta"]["step"] == 3
