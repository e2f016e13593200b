"""The log: what is committed stays, whatever happens to the writer, and damage is said, not repaired."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_run import fill_group, grade, group_row, new_log, rollout, step_commit

from protocols.log import AlreadyLogged, Log, LogError
from protocols.log_schema import PAGE_BYTES, SCHEMA, WAL_BYTES


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    with new_log(tmp_path, {"steps": 7}) as log:
        log.add_group(group_row(4))
        log.add_rollout("gen-1", rollout(4, 1, tokens=6, version=3, text="é\x00\n"), 1003.0)
        log.add_rollout("gen-2", rollout(4, 0), 1003.5)
        log.add_grade("reward-1", grade(4, 1, verdict="timeout"), 1004.0)
        log.add_grade("reward-1", grade(4, 1, attempt=1, correct=False), 1005.0)
        log.add_event("joined", "gen-1", "pid 3", 999.0)
        log.commit()
    with Log.open(tmp_path / "rollouts.db") as log:
        assert (log.meta.run, log.meta.config, log.meta.schema) == ("trial", {"steps": 7}, SCHEMA)
        row, expected = log.group(4), group_row(4)
        assert row is not None
        assert row.prompt.tobytes() == expected.prompt.tobytes()
        names = [f for f in row.__struct_fields__ if f != "prompt"]
        assert [getattr(row, f) for f in names] == [getattr(expected, f) for f in names]
        first, second = log.rollouts(4)
        assert (first.sample, second.sample, second.text, second.versions) == (0, 1, "é\x00\n", [(3, 4), (4, 2)])
        assert second.tokens.tobytes() == rollout(4, 1, tokens=6).tokens.tobytes()
        assert second.logprobs.tobytes() == rollout(4, 1, tokens=6).logprobs.tobytes()
        assert log.grades(4) == [grade(4, 1, verdict="timeout"), grade(4, 1, attempt=1, correct=False)]
        assert [(e.kind, e.worker, e.at) for e in log.events()] == [("joined", "gen-1", 999.0)]
        assert log.group(5) is None


def test_steps_plans_and_what_a_restart_needs(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        assert (log.next_group(), log.next_source_index("train"), log.last_step(), log.plan(1)) == (0, 0, 0, None)
        for group in range(4):
            fill_group(log, group, [True, False])
        log.set_group(3, "dropped", reason="all wrong")
        log.add_group(group_row(9))
        log.add_rollout("gen-1", rollout(9, 1), 1003.0)
        log.add_grade("reward-1", grade(9, 1, verdict="crash", correct=False), 1003.0)
        log.add_plan(1, [2, 0])
        log.add_plan(2, [1])
        log.commit_step(step_commit(1, loss=0.5, bad=math.nan))
        log.commit()
        assert (log.next_group(), log.next_source_index("train"), log.next_source_index("eval")) == (10, 10, 0)
        assert (log.plan(1), log.planned(), log.last_step()) == ([2, 0], [(2, [1])], 1)
        step = log.step(1)
        assert step is not None
        assert (step.weights_hash, step.metrics["loss"], math.isnan(step.metrics["bad"])) == ("hash-1", 0.5, True)
        assert (step.fingerprints, log.config(step.config_id)) == ({"weight": "print-1"}, {"steps": 2})
        log.set_config({"steps": 3})
        log.commit_step(step_commit(2))
        assert [log.config(s.config_id) for s in log.steps()] == [{"steps": 2}, {"steps": 3}]
        with pytest.raises(LogError, match="config nothing is not in the log"):
            log.config("nothing")
        assert log.step(3) is None
        assert {g.group: (g.status, g.step) for g in log.groups()} == {
            0: ("trained", 1), 1: ("trained", 2), 2: ("trained", 1), 3: ("dropped", None), 9: ("waiting", None),
        }  # fmt: skip
        (unfinished,) = log.unfinished()
        assert unfinished.row.group == 9
        assert [(s.sample, s.response_tokens, s.attempts) for s in unfinished.samples] == [
            (1, 5, [(0, "crash", False)])
        ]
        assert log.counts()["train", "trained"] == (3, 6, 27)


def test_nothing_is_counted_twice(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        fill_group(log, 0, [True, False])
        log.add_plan(1, [0])
        for write in (
            lambda: log.add_group(group_row(0)),
            lambda: log.add_rollout("gen-2", rollout(0, 1, fence=2), 1.0),
            lambda: log.add_grade("reward-2", grade(0, 1), 1.0),
            lambda: log.add_plan(2, [0]),
        ):
            with pytest.raises(AlreadyLogged, match="group 0"):
                write()
        log.commit_step(step_commit(1))
        with pytest.raises(AlreadyLogged, match="step 1 is committed already; expected step 2"):
            log.commit_step(step_commit(1))
        with pytest.raises(LogError, match="step 2, expected step 2 and that it is planned"):
            log.commit_step(step_commit(2))
        with pytest.raises(LogError, match="it is trained"):
            log.set_group(0, "dropped", reason="all wrong")
        with pytest.raises(LogError, match="not in the log"):
            log.set_group(7, "dropped")
        with pytest.raises(LogError, match="group 7 sample 0: the group"):
            log.add_rollout("gen-1", rollout(7, 0), 1.0)
        log.commit()
        assert [r.fence for r in log.rollouts(0)] == [1, 1]


LENGTHS = st.lists(st.lists(st.tuples(st.integers(1, 12), st.sampled_from("grtf")), max_size=4), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.randoms(use_true_random=False))
def test_batch_holds_what_was_graded(groups: list[list[tuple[int, str]]], random: Random) -> None:
    """g right, r failed then wrong, t timed out for good, f not graded yet: the first two are in the batch."""
    with tempfile.TemporaryDirectory() as folder, new_log(Path(folder)) as log:
        for group, samples in enumerate(groups):
            log.add_group(group_row(group, samples=max(1, len(samples))))
        arrivals = [(g, s, *entry) for g, samples in enumerate(groups) for s, entry in enumerate(samples)]
        random.shuffle(arrivals)
        for group, sample, tokens, end in arrivals:
            log.add_rollout("gen-1", rollout(group, sample, tokens=tokens), 1.0)
            if end == "g":
                log.add_grade("r", grade(group, sample), 1.0)
            if end in "rt":
                log.add_grade("r", grade(group, sample, verdict="timeout"), 1.0)
            if end == "r":
                log.add_grade("r", grade(group, sample, attempt=1, correct=False), 1.0)
        order = list(range(len(groups)))
        random.shuffle(order)
        batch, sizes = log.batch(3, order), log.sizes(order)
        kept = [[(g, s, n, end) for s, (n, end) in enumerate(groups[g]) if end in "gr"] for g in order]
        flat = [entry for entries in kept for entry in entries]
        made = [rollout(g, s, tokens=n) for g, s, n, _ in flat]
        assert batch.groups.tolist() == order
        assert batch.sizes.tolist() == [len(entries) for entries in kept]
        assert batch.lengths.tolist() == [n for _, _, n, _ in flat]
        assert batch.prompts.tobytes() == b"".join(group_row(g).prompt.tobytes() for g in order)
        assert batch.tokens.tobytes() == b"".join(r.tokens.tobytes() for r in made)
        assert batch.logprobs.tobytes() == b"".join(r.logprobs.tobytes() for r in made)
        assert batch.versions.tolist() == [v for r in made for v, n in r.versions for _ in range(n)]
        assert batch.correct.tolist() == [end == "g" for *_, end in flat]
        assert batch.rewards.tolist() == [1.0 if end == "g" else -1.5 for *_, end in flat]
        assert batch.truncated.tolist() == [n > 8 for _, _, n, _ in flat]
        assert [s.response_tokens for s in sizes] == [[n for _, _, n, _ in entries] for entries in kept]
        assert [s.prompt_tokens for s in sizes] == batch.prompt_lengths.tolist()
        with pytest.raises(LogError, match=r"groups \[99\] are not in the log"):
            log.batch(3, [*order, 99])


def test_evaluations(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        for step in (0, 5):
            for group in range(2):
                fill_group(log, 10 * step + group, [group == 0, step == 5], kind="eval", min_version=step)
        log.add_group(group_row(90, kind="eval", min_version=9))
        log.set_group(0, "evaluated")
        log.set_group(1, "evaluated")
        figures = log.evaluation(0)
        assert figures is not None
        assert (figures["accuracy"], figures["prompts"], figures["samples"]) == (0.25, 2, 4)
        assert log.evaluation(9) is None
        assert [e["eval_step"] for e in log.evaluations()] == [0]
        log.set_group(50, "evaluated")
        log.set_group(51, "evaluated")
        assert [(e["eval_step"], e["accuracy"]) for e in log.evaluations()] == [(0, 0.25), (5, 0.75)]


WRITER = """
import itertools, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from stored_run import fill_group, new_log
log = new_log(Path(sys.argv[1]))
for turn in itertools.count():
    for group in range(3 * turn, 3 * turn + 3):
        fill_group(log, group, [True, False])
    log.commit()
    print(3 * turn + 3, flush=True)
"""

FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from stored_run import fill_group, group_row, new_log, rollout
from protocols.log import LogError
log = new_log(Path(sys.argv[1]))
fill_group(log, 0, [True])
log.commit()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
try:
    log.add_group(group_row(1, samples=64))
    for sample in range(64):
        log.add_rollout("gen-1", rollout(1, sample, tokens=2000), 1.0)
    log.commit()
except LogError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
fill_group(log, 2, [True])
log.commit()
log.close()
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_was_committed_survives_kill_9(tmp_path: Path) -> None:
    with start(WRITER, tmp_path) as process:
        assert process.stdout is not None
        try:
            said = [int(process.stdout.readline()) for _ in range(20)]
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait(10)
        said += [int(line) for line in process.stdout]
    with Log.open(tmp_path / "rollouts.db", write=True) as log:
        groups = [row.group for row in log.groups()]
        assert len(groups) >= said[-1]
        assert len(groups) % 3 == 0, "a turn is there as a whole or not at all"
        assert log.batch(1, groups).tokens.shape[0] == 9 * len(groups)
        fill_group(log, log.next_group(), [True])
        log.commit()


def test_readers_see_whole_commits_while_a_process_writes(tmp_path: Path) -> None:
    with start(WRITER, tmp_path) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            with Log.open(tmp_path / "rollouts.db") as log:
                seen = []
                for _ in range(30):
                    said = int(process.stdout.readline())
                    seen.append(log.next_group())
                    assert seen[-1] >= said
                    assert seen[-1] % 3 == 0
                assert seen == sorted(seen)
                with pytest.raises(LogError, match="another process writes this log"):
                    Log.open(tmp_path / "rollouts.db", write=True)
                with pytest.raises(LogError, match="readonly"):
                    log.add_event("joined", "nobody", "", 1.0)
        finally:
            process.kill()


def test_a_full_disk_is_one_error_and_loses_nothing_committed(tmp_path: Path) -> None:
    with start(FILLS_THE_DISK, tmp_path) as process:
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "nothing since the last commit is kept. Is the disk full?" in said
    with Log.open(tmp_path / "rollouts.db") as log:
        assert [row.group for row in log.groups()] == [0, 2]
        assert log.batch(1, [0, 2]).sizes.tolist() == [1, 1]


def test_the_write_ahead_log_stays_small(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.db"
    with new_log(tmp_path) as log, Log.open(path) as reader:
        for group in range(30):
            log.add_group(group_row(group, samples=8))
            for sample in range(8):
                log.add_rollout("gen-1", rollout(group, sample, tokens=100_000), 1.0)
            log.commit()
            assert len(reader.rollouts(group)) == 8
            assert path.with_name("rollouts.db-wal").stat().st_size < 2 * WAL_BYTES
    assert path.stat().st_size > 2 * WAL_BYTES
    assert not path.with_name("rollouts.db-wal").exists()


def small_log(folder: Path) -> Path:
    with new_log(folder) as log:
        for group in range(40):
            log.add_group(group_row(group))
            log.add_rollout("gen-1", rollout(group, 0, tokens=3000), 1.0)
        log.commit()
    return folder / "rollouts.db"


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbled(path: Path) -> None:
    path.write_bytes(b"step,loss\n" * 5000)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def of_another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (key, value)")
    connection.close()


def of_another_schema(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "malformed; expected an undamaged"),
        (garbled, "not a database; expected an undamaged"),
        (emptied, "not a Headrace log: got application id 0x0"),
        (of_another_program, "not a Headrace log: got application id 0x0"),
        (of_another_schema, f"got schema version {SCHEMA + 1}, expected {SCHEMA}"),
    ],
)
def test_a_damaged_log_is_refused_and_left_alone(tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    path = small_log(tmp_path)
    damage(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    for write in (False, True):
        with pytest.raises(LogError, match=said) as caught:
            Log.open(path, write=write)
        assert str(path) in str(caught.value)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_damage_inside_is_one_error_when_it_is_read(tmp_path: Path) -> None:
    path = small_log(tmp_path)
    with path.open("r+b") as file:
        file.seek(8 * PAGE_BYTES)
        file.write(b"\xff" * (path.stat().st_size - 8 * PAGE_BYTES))
    with Log.open(path) as log, pytest.raises(LogError, match=str(path)):
        log.batch(1, list(range(40)))


def test_a_log_is_made_once_and_opened_where_it_is(tmp_path: Path) -> None:
    new_log(tmp_path).close()
    with pytest.raises(LogError, match="exists already"):
        new_log(tmp_path)
    with pytest.raises(LogError, match="no such log"):
        Log.open(tmp_path / "other.db")
    with pytest.raises(LogError, match="No such file or directory"):
        Log.create(tmp_path / "missing" / "rollouts.db", run="r", config={}, code_version="1")
    assert not list(tmp_path.glob("*.new"))


def test_the_documented_query_works(tmp_path: Path) -> None:
    with new_log(tmp_path) as log:
        fill_group(log, 0, [True, False])
        log.add_plan(1, [0])
        log.commit_step(step_commit(1))
    with Log.open(tmp_path / "rollouts.db") as log:
        assert log.last_step() == 0, "closing is not committing"
    with Log.open(tmp_path / "rollouts.db", write=True) as log:
        fill_group(log, 0, [True, False])
        log.add_plan(1, [0])
        log.commit_step(step_commit(1))
        log.commit()
    connection = sqlite3.connect(f"file:{tmp_path}/rollouts.db?mode=ro", uri=True)
    sql = "SELECT step, avg(correct), avg(response_tokens) FROM samples WHERE group_status = 'trained' GROUP BY step"
    assert connection.execute(sql).fetchall() == [(1, 0.5, 4.5)]
    connection.close()
