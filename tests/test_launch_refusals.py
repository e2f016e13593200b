"""`headrace launch` with real roles on input that cannot be used: one clear line, no second try, no process left."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from trial import CONFIG

from engine.config import load_config
from engine.models import create_model
from protocols.link import Server
from protocols.link_messages import PROTOCOL

ROOT = Path(__file__).parent.parent
MODEL = 'model={type="path", path="model"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "trial.toml").write_text(CONFIG)
    rows = "".join(f'{{"prompt": "{i}+1=", "answer": "2"}}\n' for i in range(100, 110))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "broken.jsonl").write_text(rows + '{"prompt": 3\n')
    create_model(load_config(tmp_path / "trial.toml").model, tmp_path / "model", 0)  # type: ignore[arg-type]
    return tmp_path


def launch(folder: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and stderr; nothing that works in the folder is left."""
    options = [part for override in (MODEL, *overrides) for part in ("--set", override)]
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "launch", "--no-view", "trial.toml", *options],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert there(folder) == []
    return done.returncode, done.stderr


def there(folder: Path) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                found.append(process.cmdline())
        except psutil.Error:
            continue
    return found


def starts(folder: Path) -> list[str]:
    diary = (folder / "runs" / "trial" / "logs" / "launch.log").read_text()
    return [line.split()[2] for line in diary.splitlines() if " started (pid " in line]


def test_a_port_in_use(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, err = launch(folder, f"buffer.address=tcp://127.0.0.1:{port}")
    assert code == 1
    assert err.count("\n") == 2, err
    assert f"| headrace: bind tcp://127.0.0.1:{port}: address already in use" in err
    assert starts(folder) == ["buffer"]


def test_a_data_row_that_cannot_be_read(folder: Path) -> None:
    code, err = launch(folder, "tasks.0.path=broken.jsonl")
    assert code == 2
    assert err.count("\n") == 2, err
    assert "| headrace: broken.jsonl:11: not JSON: " in err
    assert starts(folder) == ["buffer"]


def test_prompts_that_are_longer_than_the_limit(folder: Path) -> None:
    code, err = launch(folder, "buffer.prompt_tokens=3")
    assert code == 2
    assert err.count("headrace: rows.jsonl:") == 1
    assert "the prompt has 6 tokens, expected 1 to 3 (buffer.prompt_tokens); set buffer.long_prompts" in err
    assert starts(folder).count("buffer") == 1


def test_a_role_of_another_protocol_version(folder: Path) -> None:
    """A real one: the same code with another number, as a worker of another release is."""
    other = folder / "other"
    for package in ("protocols", "engine", "workers"):
        shutil.copytree(ROOT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    messages = other / "protocols" / "link_messages.py"
    text = messages.read_text()
    assert text.count(f"PROTOCOL = {PROTOCOL}\n") == 1
    messages.write_text(text.replace(f"PROTOCOL = {PROTOCOL}\n", "PROTOCOL = 99\n"))
    server = Server("tcp://127.0.0.1:0", heartbeat_s=1.0, peer_timeout_s=5.0)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "workers.cli", "reward", "trial.toml", "--join", server.address, "--name", "late"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(other)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        events = [event for _ in range(600) if process.poll() is None for event in server.poll(0.1)]
    finally:
        server.close()
        process.kill()
        _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.count("\n") == 1
    assert f"protocol: got version {PROTOCOL}, expected 99" in err
    assert events == []
