"""One process of a role on a node of a Ray cluster: an actor starts it there, and brings back its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray

from workers.supervise import TETHER

LOOK_S = 60.0
"""How long a node may take to say whether it sees the run's folder."""
QUIET_S = 0.2
"""How long an actor waits for output before it answers that there is none."""


class RoleProcess:
    """On a node of the cluster; its one process ends with it. Calls run one after another, in the actor's main thread."""

    def start(self, command: list[str], env: dict[str, str]) -> str:
        """Where the process runs, and as what."""
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(TETHER), str(os.getpid()), *command],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if self.process.stdout is not None:
            os.set_blocking(self.process.stdout.fileno(), False)
        return f"pid {self.process.pid} on {ray.util.get_node_ip_address()}"

    def poll(self) -> tuple[bytes, int | None]:
        """What it has written since, and its exit code once it has ended and all is read."""
        until = time.monotonic() + QUIET_S
        while True:
            ended = self.process.poll()
            new = self.process.stdout.read(1 << 20) if self.process.stdout is not None else b""
            if new or ended is not None or time.monotonic() > until:
                return new or b"", None if new else ended
            time.sleep(0.02)

    def kill(self, number: int) -> None:
        """A signal to all of the process's session."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


ACTOR: Any = ray.remote(max_restarts=0, max_task_retries=0)(RoleProcess)


class Child:
    """A role: its actors (a learner over several nodes has some, any other role one) and what they still owe."""

    def __init__(self, actors: list[Any], log: Path) -> None:
        self.actors, self.log = actors, log
        self.offset = log.stat().st_size if log.exists() else 0
        self.began = time.monotonic()
        self.heard = self.began
        self.codes: list[int | None] = [None] * len(actors)
        self.owed: list[Any] = [None] * len(actors)
        self.runs = [False] * len(actors)

    def write(self, text: bytes) -> None:
        with self.log.open("ab") as file:
            file.write(text)


def look(command: list[str]) -> str:
    """On a node: what is wrong there; empty when nothing is."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{ray.util.get_node_ip_address()}: {error}"
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip().removeprefix("headrace: ")
