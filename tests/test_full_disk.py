"""A disk that takes nothing more ends a run at once with one error, loses nothing, and `--resume` goes on."""

from __future__ import annotations

import errno
import os
import shlex
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from protocols.log import Log
from tools.faults.ended import NoSmallDisk, require_small_disk
from workers.last_words import KEY, LastWords, out_of_space, say_last_words
from workers.roles import is_refusal
from workers.supervise import Exit, Supervisor
from workers.why import standstill

ROOT = Path(__file__).parent.parent
CONFIG = """
name = "trial"
steps = 20
runs = "FOLDER/runs"
model = { type = "new", alphabet = "0123456789+= ", hidden = HIDDEN, layers = 1, heads = 2, kv_heads = 1, context = 64 }
objective = { type = "dapo" }
buffer = { groups_per_step = 2, samples_per_group = 4, prompt_tokens = 16 }
generator = { sampling = { max_tokens = 8 } }
learner = { lr = 1e-3, token_budget = 256, checkpoint_every = EVERY }
reward = { scorers = 1 }

[[tasks]]
type = "jsonl"
path = "FOLDER/rows.jsonl"
chat = false
held_out = 0
score = { type = "python", function = "coin:score" }
"""
COIN = """
import zlib
def score(text, row):
    return zlib.crc32(text.encode()) % 2 == 0
"""
SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs runs
timeout 90 {launch} > first.out 2> first.err; echo $? > first.code
cp -r runs before
mount -o remount,size=64m runs
timeout 90 {launch} --resume > second.out 2> second.err; echo $? > second.code
cp -r runs after
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "2"}}\n' for i in range(100, 140)))
    (tmp_path / "coin.py").write_text(COIN)
    (tmp_path / "runs").mkdir()
    return tmp_path


def configure(folder: Path, *, hidden: int = 16, every: int = 50) -> Path:
    text = CONFIG.replace("FOLDER", str(folder)).replace("HIDDEN", str(hidden)).replace("EVERY", str(every))
    (folder / "trial.toml").write_text(text)
    return folder / "trial.toml"


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]), "COLUMNS": "300"}


def launch(folder: Path, *arguments: str, file_kb: int | None = None) -> tuple[int, str]:
    """Exit code and stderr of `headrace launch`, with no file allowed to grow beyond `file_kb`."""
    command = shlex.join([sys.executable, "-m", "workers.cli", "launch", "--no-view", "trial.toml", *arguments])
    limit = f"ulimit -f {file_kb}; " if file_kb else ""
    done = subprocess.run(
        ["bash", "-c", f"{limit}exec {command}"],
        cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr


def left_behind(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(folder) in command and "workers" in command:
            found.append(command)
    return found


def rows(path: Path) -> dict[str, list[tuple]]:  # type: ignore[type-arg]
    """What must not change once it is committed."""
    with Log.open(path) as log:
        return {
            "rollouts": log.query("SELECT group_id, sample, fence, tokens, logprobs FROM rollouts"),
            "grades": log.query("SELECT group_id, sample, attempt, verdict, reward FROM grades"),
            "steps": log.query("SELECT step, weights_hash FROM steps"),
            "plan": log.query("SELECT step, position, group_id FROM plan"),
        }


def nothing_lost(before: dict[str, list[tuple]], after: dict[str, list[tuple]]) -> None:  # type: ignore[type-arg]
    for table, kept in before.items():
        assert set(kept) <= set(after[table]), table


def test_a_log_that_cannot_grow_ends_the_run_at_once_and_resume_goes_on(folder: Path) -> None:
    configure(folder)
    code, err = launch(folder, file_kb=500)
    assert code == 2, err
    assert err.startswith("headrace: buffer refused to run (exit code 2)")
    assert f"headrace: {folder}/runs/trial/rollouts.db: writing " in err
    assert err.rstrip().endswith("continue with: headrace launch trial.toml --resume")
    diary = (folder / "runs" / "trial" / "logs" / "launch.log").read_text()
    assert diary.count("buffer started") == 1, diary
    assert (found := standstill(folder / "runs" / "trial")).kind == "ended"
    assert f"buffer refused to run (exit code 2); the end of {folder}/runs/trial/logs/buffer.log" in found.text
    assert left_behind(folder) == []
    before = rows(folder / "runs" / "trial" / "rollouts.db")
    assert before["rollouts"]
    code, err = launch(folder, "--resume")
    assert code == 0, err
    after = rows(folder / "runs" / "trial" / "rollouts.db")
    nothing_lost(before, after)
    assert [step for step, _ in after["steps"]] == list(range(1, 21))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_once_and_resume_goes_on(folder: Path) -> None:
    configure(folder, hidden=256, every=2)
    code, err = launch(folder, "--set", "steps=4", file_kb=3_000)
    assert code == 2, err
    assert err.startswith("headrace: learner refused to run (exit code 2)")
    assert f"headrace: checkpoint {folder}/runs/trial/checkpoints/step-000002: cannot be written: " in err
    assert "; free space there\n" in err
    diary = (folder / "runs" / "trial" / "logs" / "launch.log").read_text()
    assert diary.count("learner started") == 1, diary
    assert left_behind(folder) == []
    assert list((folder / "runs" / "trial" / "checkpoints").iterdir()) == []
    before = rows(folder / "runs" / "trial" / "rollouts.db")
    assert len(before["steps"]) >= 2
    code, err = launch(folder, "--set", "steps=4", "--resume")
    assert code == 0, err
    nothing_lost(before, rows(folder / "runs" / "trial" / "rollouts.db"))


def small_disk(folder: Path, size: str) -> None:
    """Both launches of SMALL_DISK in a user's own name space, where the runs folder is a disk of `size`."""
    try:
        require_small_disk(folder / "runs")
    except NoSmallDisk as error:
        pytest.skip(f"no small disk: {error}")
    command = shlex.join([sys.executable, "-m", "workers.cli", "launch", "--no-view", "trial.toml"])
    script = SMALL_DISK.format(size=size, launch=command)
    subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script], cwd=folder, env=environment(folder), check=True, timeout=200
    )


def test_a_disk_that_is_really_full_is_said_with_what_is_free_and_loses_nothing(folder: Path) -> None:
    configure(folder)
    small_disk(folder, "1m")
    err = (folder / "first.err").read_text()
    assert (folder / "first.code").read_text() == "2\n", err
    assert "refused to run (exit code 2)" in err
    assert "database or disk is full" in err
    assert f"the file system of {folder}/runs/trial has 0." in err
    assert err.count("--resume") == 1
    assert (folder / "second.code").read_text() == "0\n", (folder / "second.err").read_text()
    nothing_lost(rows(folder / "before" / "trial" / "rollouts.db"), rows(folder / "after" / "trial" / "rollouts.db"))
    assert left_behind(folder) == []


# --- last words --------------------------------------------------------------------------------------------------------

SPEAKS = """
import subprocess, sys
from workers.last_words import say_last_words
if sys.argv[1:]:
    say_last_words("headrace: the disk is full")
else:
    subprocess.run([sys.executable, __file__, "deeper"], close_fds=True, start_new_session=True)
    sys.exit(1)
"""


def test_last_words_of_a_process_below_a_role_reach_the_launcher_without_its_log(tmp_path: Path) -> None:
    (tmp_path / "speaks.py").write_text(SPEAKS)
    supervisor = Supervisor(tmp_path / "logs")
    open_before = len(os.listdir("/proc/self/fd"))
    supervisor.start("learner", [sys.executable, str(tmp_path / "speaks.py")], {"PYTHONPATH": str(ROOT)})
    deadline, exits = time.monotonic() + 20, []
    while not exits and time.monotonic() < deadline:
        exits = supervisor.exits()
        time.sleep(0.02)
    assert [(exit.code, exit.tail, exit.refusal) for exit in exits] == [(1, "", "headrace: the disk is full")]
    assert is_refusal(exits[0])
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_the_exit_code_and_the_reason_survive_a_log_file_that_takes_nothing(tmp_path: Path) -> None:
    words = tmp_path / "words"
    command = f"exec {shlex.join([sys.executable, '-m', 'workers.cli', 'show', 'nosuch'])} 2> /dev/full"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment(tmp_path) | {KEY: str(words)}, timeout=60
    )
    assert done.returncode == 2
    assert words.read_text().startswith("headrace: nosuch: no such run")


def test_last_words_without_a_launcher_are_nothing() -> None:
    assert KEY not in os.environ
    say_last_words("nobody hears this")
    words = LastWords()
    assert words.read() == ""
    words.close()
    assert not is_refusal(Exit("learner", 1, 1.0, ""))


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (caused(RuntimeError("checkpoint"), OSError(errno.EFBIG, "File too large")), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("I/O error (os error 2)"), False),
        (sqlite3.OperationalError("locked"), False),
    ],
)
def test_what_a_full_disk_looks_like(error: BaseException, full: bool) -> None:
    assert out_of_space(error) is full
