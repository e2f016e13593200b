"""Faults that end a launch: a disk that is full, and data of which nothing is left. Each is a small run of its own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from tools.faults.standing import Answer, ask_why, parse_answer

CONFIG = """
name = "ends"
steps = 100000
runs = "FOLDER/runs"
objective = { type = "sft" }
buffer = { groups_per_step = 32, prompt_tokens = 32, long_prompts = "skip" }
learner = { lr = 1e-5, token_budget = 4096 }

[model]
type = "new"
alphabet = "abcdefghijklmnopqrstuvwxyz0123456789= "
hidden = 16
layers = 1
heads = 2
kv_heads = 1
intermediate = 32
context = 64

[[tasks]]
type = "jsonl"
path = "tools/faults/prompts.jsonl"
chat = false
solution = "{answer}"
score = { type = "exact" }
held_out = 0
"""
CLI = [sys.executable, "-m", "workers.cli"]
SMALL_DISK = """
mount -t tmpfs -o size=1m tmpfs {runs}
timeout 90 {launch} > {folder}/launch.out 2>&1
{why}
"""
ENDS_S = 120


class NoSmallDisk(RuntimeError):
    """This machine lets nobody mount a small disk of his own."""


def fill_disk(folder: Path) -> Answer:
    """A launch whose runs are on a disk of 1 MiB, in a name space of its own, and what is said there once it has ended.
    Raises `NoSmallDisk`."""
    config = _config(folder)
    runs = folder / "runs"
    runs.mkdir()
    require_small_disk(runs)
    script = SMALL_DISK.format(
        runs=shlex.quote(str(runs)),
        folder=shlex.quote(str(folder)),
        launch=shlex.join([*CLI, "launch", "--no-view", str(config)]),
        why=shlex.join([*CLI, "status", str(runs / "ends"), "--why"]),
    )
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, timeout=ENDS_S)
    return parse_answer(done.stdout if done.returncode == 0 else done.stdout + done.stderr)


def require_small_disk(folder: Path) -> None:
    """Raises `NoSmallDisk` where a user cannot mount one on this folder in a name space of his own."""
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        possible = subprocess.run(probe, capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        raise NoSmallDisk("needs util-linux's unshare and user namespaces, which the kernel or a container forbids")


def exhaust_data(folder: Path) -> Answer:
    """A launch all of whose prompts are too long, and to be skipped."""
    command = [*CLI, "launch", "--no-view", str(_config(folder)), "--set", "buffer.prompt_tokens=1"]
    subprocess.run(command, capture_output=True, timeout=ENDS_S)
    return ask_why(folder / "runs" / "ends")


def _config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ends.toml"
    path.write_text(CONFIG.replace("FOLDER", str(folder)), encoding="utf-8")
    return path
