"""A whole run at an address beyond loopback, with the keys that launch makes; and no secret anywhere but in the key files."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_pipeline import MODEL
from zmq.utils import z85

from protocols.link import Client, LinkRefused
from protocols.link_keys import make_keys, read_buffer_keys, read_worker_keys
from protocols.link_messages import Hello
from protocols.log import Log
from workers.learner import ELSEWHERE

CONFIG = """
name = "keyed"
steps = 3
runs = "FOLDER"
MODEL
[objective]
type = "dapo"
[buffer]
groups_per_step = 4
samples_per_group = 4
prompt_tokens = 32
dynamic_sampling = false
address = "tcp://ADDRESS:0"
[generator]
sampling = { max_tokens = 8 }
engine = { type = "torch", slots = 16 }
[learner]
lr = 1e-4
checkpoint_every = 2
"""


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ELSEWHERE, 9))
        except OSError:
            pytest.skip("this machine has no address beyond loopback; give it one: ip address add 10.9.9.9 dev lo")
        return str(probe.getsockname()[0])


def headrace(*arguments: str, timeout_s: float = 200.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def config_in(folder: Path, address: str) -> Path:
    path = folder / "keyed.toml"
    text = CONFIG.replace("FOLDER", str(folder)).replace("MODEL", MODEL).replace("ADDRESS", address)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_buffer_without_keys_is_refused_beyond_loopback(tmp_path: Path) -> None:
    done = headrace("buffer", str(config_in(tmp_path, "0.0.0.0")))
    assert done.returncode == 2
    assert re.fullmatch(r"headrace: bind: tcp://0\.0\.0\.0:0 reaches beyond .*`headrace keygen DIR`.*\n", done.stderr)
    assert not (tmp_path / "keyed" / "rollouts.db").exists()


def test_a_keyed_run_and_its_secrets(tmp_path: Path) -> None:
    """Launch makes the keys; every role, the view and `status` use them; strangers are refused while it runs."""
    config, run = config_in(tmp_path, own_address()), tmp_path / "keyed"
    launcher = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", "launch", "--no-view", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        status = _status_while_it_runs(run, launcher)
        output, _ = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
        launcher.wait(30.0)
    assert launcher.returncode == 0, output
    assert "made keys in" in output
    with Log.open(run / "rollouts.db") as log:
        assert log.last_step() == 3
    exported = tmp_path / "rows.jsonl"
    said = [output, status]
    for command in (
        ("show", str(run)),
        ("check", str(config)),
        ("export", str(run), str(exported)),
        ("audit", str(run)),
    ):
        done = headrace(*command)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    _no_secret_in(run, [*said, exported.read_text(encoding="utf-8")])


def _status_while_it_runs(run: Path, launcher: subprocess.Popen[str]) -> str:
    """What `headrace status` prints, and that an unknown key does not get that far."""
    deadline = time.monotonic() + 120.0
    while not (run / "address").exists():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline, "no buffer"
        time.sleep(0.05)
    address = (run / "address").read_text(encoding="utf-8").strip()
    assert "127.0.0.1" not in address
    make_keys(run.parent / "foreign")
    theirs = read_worker_keys(run.parent / "foreign", "generator")
    stranger = type(theirs)(theirs.role, theirs.public, theirs.secret, read_buffer_keys(run / "keys").public)
    with pytest.raises(LinkRefused, match="does not know this worker's key"):
        Client(address, Hello(role="generator", name="x", host="h", pid=1, capacity=9), timeout_s=60.0, keys=stranger)
    done = headrace("status", str(run))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def _no_secret_in(run: Path, texts: list[str]) -> None:
    keys = run / "keys"
    secrets = [read_buffer_keys(keys).secret]
    secrets += [read_worker_keys(keys, path.stem).secret for path in keys.iterdir() if path.stem != "buffer"]
    forms = {
        form for secret in secrets for form in (secret.encode(), z85.decode(secret), z85.decode(secret).hex().encode())
    }
    files = [path for path in run.rglob("*") if path.is_file() and path.parent != keys]
    assert {"rollouts.db", "metrics.jsonl", "buffer.log", "generator-0.log"} <= {path.name for path in files}
    for where, content in [(str(path), path.read_bytes()) for path in files] + [("output", t.encode()) for t in texts]:
        assert not any(form in content for form in forms), f"a secret key is in {where}"
        tokens = re.findall(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", content)
        assert not tokens, f"{where} holds what looks like the store's token"
