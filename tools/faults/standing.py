"""A small pipeline whose roles are started one by one, as by hand, so that none comes back by itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from engine.config import load_config
from protocols.link_messages import Status
from tools.faults.mood import FILE, Mood
from tools.faults.observer import Observer
from tools.faults.processes import slowed
from workers.roles import ROLE_COMMAND, role_command, role_threads, roles
from workers.supervise import Supervisor

OWN = Path(__file__).with_name("why.toml")
OWED = re.compile(r"^(?P<text>.*)\nowed by: (?P<owes>.*)$", re.DOTALL)


class Answer(Struct, frozen=True):
    """What `headrace status RUN --why` says: the cause, and by whom the run goes on."""

    text: str
    owes: str


def ask_why(run: str | Path) -> Answer:
    """By the command itself. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "workers.cli", "status", str(run), "--why"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return parse_answer(done.stdout if done.returncode == 0 else done.stdout + done.stderr)


def parse_answer(said: str) -> Answer:
    found = OWED.match(said.strip())
    if found is None:
        raise RuntimeError(f"headrace status --why: got {said!r}, expected a cause and a line `owed by: NAME`")
    return Answer(found["text"], found["owes"])


class Standing:
    """Buffer, learner, generator and reward; `close` it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.mood_file = folder / "why.toml", folder / "mood"
        self.file.write_text(f'runs = "{folder}"\n{OWN.read_text(encoding="utf-8")}', encoding="utf-8")
        self.mood("fair")
        self.config = load_config(self.file)
        self.run_dir = self.config.run_dir
        self.supervisor, self.observer = Supervisor(self.run_dir / "logs"), Observer(self.run_dir)

    def __enter__(self) -> Standing:
        try:
            self._start_all()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.observer.close()
        self.supervisor.stop(self.supervisor.running, grace_s=0.0)

    # --- its processes -----------------------------------------------------------------------------------------------

    def start(self, name: str, *overrides: str) -> None:
        command = role_command(
            name,
            self.config,
            [str(self.file), *(part for override in overrides for part in ("--set", override))],
            address=self.address,
            resume=(self.run_dir / "rollouts.db").exists(),
            command=ROLE_COMMAND,
        )
        self.supervisor.start(name, command, {"OMP_NUM_THREADS": str(role_threads(name, self.config)), **self._env})

    def kill(self, name: str) -> None:
        """SIGKILL and nothing before it: a buffer that is told to end would send everybody home."""
        self.send(name, signal.SIGKILL)
        if not self.within(10.0, lambda: bool(self.supervisor.exits())):
            raise RuntimeError(f"waited 10 s in vain for {name} to be gone")

    def send(self, name: str, number: signal.Signals) -> None:
        os.kill(self.supervisor.pid(name), number)

    def slowed(self, name: str, *, stopped_s: float, runs_s: float) -> AbstractContextManager[None]:
        """A role's process that gets little of the machine."""
        return slowed(psutil.Process(self.supervisor.pid(name)), stopped_s=stopped_s, runs_s=runs_s)

    def mood(self, mood: Mood) -> None:
        """How the reward scores from now on."""
        self.mood_file.write_text(mood, encoding="utf-8")

    # --- what is seen of it ------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Empty until the buffer has published it."""
        path = self.run_dir / "address"
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    def worker(self, name: str) -> dict[str, Any]:
        """As the buffer last heard of it; empty when it knows none of this name."""
        status = self.observer.status()
        return next((w for w in status.workers if w["name"] == name), {}) if status is not None else {}

    def until(self, what: str, holds: Callable[[Status], bool], timeout_s: float = 180.0) -> None:
        """Until the buffer's status is so. Raises RuntimeError when a role has ended, or naming `what` past the time."""
        deadline = time.monotonic() + timeout_s
        while (status := self.observer.status()) is None or not holds(status):
            for exit in self.supervisor.exits():
                raise RuntimeError(f"{exit.name} ended ({exit.how}):\n{exit.tail}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"waited {timeout_s:.0f} s in vain for {what}; the logs are in {self.run_dir / 'logs'}"
                )
            time.sleep(0.02)

    def within(self, seconds: float, holds: Callable[[], bool]) -> bool:
        """Whether something comes true in this time; returns as soon as it does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if holds():
                return True
            time.sleep(0.02)
        return False

    def until_it_goes_on(self) -> None:
        """Starts who is missing, and waits until the buffer knows every role, all generators serve weights, and a step is
        committed that was not yet."""
        for name in roles(self.config):
            if name not in self.supervisor.running:
                self.start(name)
        before = self.observer.step()

        def goes_on(status: Status) -> bool:
            served = [w for w in status.workers if w["role"] != "generator" or w.get("version") is not None]
            return len(served) == len(roles(self.config)) and status.step > before

        self.until("all roles and another step", goes_on)

    # --- start -------------------------------------------------------------------------------------------------------

    @property
    def _env(self) -> dict[str, str]:
        return {FILE: str(self.mood_file), "TORCH_CPP_LOG_LEVEL": "ERROR"}

    def _start_all(self) -> None:
        self.start("model")
        deadline = time.monotonic() + 120.0
        while not (ended := self.supervisor.exits()) and time.monotonic() < deadline:
            time.sleep(0.02)
        if not ended or ended[0].code != 0:
            raise RuntimeError(f"the model could not be made: {ended[0].tail if ended else '120 s are over'}")
        self.start("buffer")
        self.until("the buffer", lambda status: True)
        for name in roles(self.config):
            self.start(name)
