"""The command line as a user meets it: real processes, exit codes, one clear line for each kind of bad input."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from stored_run import small_run
from trial import CONFIG

from engine.config import load_config
from engine.models import create_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trial.toml").write_text(CONFIG)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 8)
    return tmp_path


@pytest.fixture
def with_model(folder: Path) -> Path:
    config = load_config(folder / "trial.toml")
    create_model(config.model, folder / "runs" / "trial" / "model", 0)  # type: ignore[arg-type]
    return folder


def headrace(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workers.cli", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def buffer(with_model: Path) -> Iterator[subprocess.Popen[str]]:
    """A real buffer that serves; its address is in runs/trial/address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", "buffer", "trial.toml"],
        cwd=with_model, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    address = with_model / "runs" / "trial" / "address"
    deadline = time.monotonic() + 30
    while not address.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert address.exists(), "waited 30 s for the buffer's address"
    yield process
    process.kill()
    process.communicate()


def test_help_lists_every_command_and_loads_nothing_heavy(folder: Path) -> None:
    found = headrace(folder, "--help")
    assert found.returncode == 0
    for command in (
        "launch",
        "buffer",
        "generator",
        "reward",
        "learner",
        "check",
        "show",
        "export",
        "status",
        "report",
    ):
        assert f" {command} " in found.stdout
    heavy = "{'torch', 'transformers', 'zmq', 'matplotlib', 'reasoning_gym', 'pyarrow', 'tensorboard'}"
    code = f"import sys, workers.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("check", "nosuch.toml"), "nosuch.toml: cannot be read"),
        (("check", "rows.jsonl"), "rows.jsonl: not TOML"),
        (("check", "trial.toml", "--set", "learner.rate=1"), "unknown field `rate` - at `$.learner`"),
        (("check", "trial.toml", "--set", "steps"), "expected section.key=value"),
        (("buffer", "trial.toml", "--set", "steps='many'"), "Expected `int`, got `str` - at `$.steps`"),
        (("launch", "trial.toml", "--set", "steps=0"), "steps"),
        (("launch", "trial.toml", "--set", "learner.rate=1"), "unknown field `rate` - at `$.learner`"),
        (("launch", "trial.toml", "--set", "buffer.samples_per_group=1"), "no step would ever start"),
        (("launch", "trial.toml", "--set", "model={type='path', path='nosuch'}"), "nosuch"),
        (("generator", "trial.toml"), "runs/trial/address: not there"),
        (("learner", "trial.toml"), "--join tcp://HOST:PORT"),
        (("show", "nosuch"), "nosuch: no such run"),
        (("export", "nosuch", "rows.jsonl"), "nosuch: no such run"),
        (("status", "nosuch"), "nosuch: no such run"),
        (("report", "nosuch"), "nosuch: no such run"),
    ],
)
def test_bad_input_is_one_clear_error_and_exit_code_2(folder: Path, arguments: tuple[str, ...], expected: str) -> None:
    found = headrace(folder, *arguments)
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("headrace: ")
    assert expected in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_contradiction_is_named_by_check(folder: Path) -> None:
    found = headrace(folder, "check", "trial.toml", "--set", "learner.ranks=0")
    assert found.returncode == 2
    assert "learner.ranks" in found.stdout


def test_the_traceback_is_there_for_who_asks(folder: Path) -> None:
    found = headrace(folder, "check", "nosuch.toml", HEADRACE_TRACEBACK="1")
    assert found.returncode != 0
    assert "Traceback" in found.stderr


def test_what_a_log_holds_is_shown_and_exported(folder: Path) -> None:
    small_run(folder / "runs" / "trial")
    for arguments, expected in (
        (("show", "trial"), "trial"),
        (("show", "trial", "--group", "5"), "all wrong"),
        (("show", "runs/trial", "--step", "1"), "hash-1"),
        (("export", "trial", "rows-out.jsonl"), "rows in rows-out.jsonl"),
        (("status", "trial"), "runs/trial: 1 of 2 steps, not complete"),
    ):
        found = headrace(folder, *arguments)
        assert found.returncode == 0, (arguments, found.stderr)
        assert expected in found.stdout
    assert (folder / "rows-out.jsonl").read_text().count("\n") > 5


def damage(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)


def age(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 1")
    connection.close()


@pytest.mark.parametrize(("spoil", "expected"), [(damage, "not a database"), (age, "got schema version 1, expected")])
def test_a_log_that_cannot_be_used_has_the_same_exit_code_everywhere(
    with_model: Path, spoil: Callable[[Path], None], expected: str
) -> None:
    small_run(with_model / "runs" / "trial")
    spoil(with_model / "runs" / "trial" / "rollouts.db")
    for arguments in (
        ("show", "trial"),
        ("status", "trial"),
        ("report", "trial"),
        ("export", "trial", "rows-out.jsonl"),
        ("buffer", "trial.toml", "--resume"),
        ("launch", "--no-view", "trial.toml", "--resume"),
    ):
        found = headrace(with_model, *arguments)
        assert found.returncode == 2, (arguments, found.stderr)
        assert "headrace: runs/trial/rollouts.db: " in found.stderr
        assert expected in found.stderr
        assert "Traceback" not in found.stderr


def test_a_buffer_loads_no_torch_and_tells_its_status(buffer: subprocess.Popen[str], with_model: Path) -> None:
    libraries = Path(f"/proc/{buffer.pid}/maps").read_text()
    assert "libzmq" in libraries
    assert "libtorch" not in libraries
    found = headrace(with_model, "status", "trial")
    assert found.returncode == 0
    assert "trial · step 0 of 3" in found.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_buffer_ends_on_signals_with_their_exit_code(
    buffer: subprocess.Popen[str], number: signal.Signals, code: int
) -> None:
    buffer.send_signal(number)
    _, err = buffer.communicate(timeout=20)
    assert buffer.returncode == code
    assert "Traceback" not in err


def test_a_log_that_is_there_and_a_port_in_use_are_refused(buffer: subprocess.Popen[str], with_model: Path) -> None:
    found = headrace(with_model, "buffer", "trial.toml")
    assert found.returncode == 2
    assert "continue it with --resume" in found.stderr
    with zmq.Context() as context, context.socket(zmq.ROUTER) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        (with_model / "runs" / "other").mkdir()
        (with_model / "runs" / "trial" / "model").rename(with_model / "runs" / "other" / "model")
        found = headrace(
            with_model, "buffer", "trial.toml", "--set", "name=other", "--address", f"tcp://127.0.0.1:{port}"
        )
    assert found.returncode == 1
    assert f"headrace: bind tcp://127.0.0.1:{port}: address already in use" in found.stderr.replace("A", "a")


def test_a_worker_that_finds_no_buffer_says_what_it_waited_for(folder: Path) -> None:
    (folder / "runs" / "trial").mkdir(parents=True)
    (folder / "runs" / "trial" / "address").write_text("tcp://127.0.0.1:9\n")
    found = headrace(folder, "status", "trial")
    assert found.returncode == 2
    assert "runs/trial/rollouts.db: no such log" in found.stderr
