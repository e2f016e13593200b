"""Runs an experiment's arms as runs of the real pipeline, one after the other, each at most once."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from engine.config import Config, load_config
from tools.experiments.arms import Arm
from workers.run_folder import complete, log_path

STOP_S = 90.0
"""For a run that Ctrl-C ends to leave in order."""


class RunFailed(RuntimeError):
    """`headrace launch` did not end well; names the run, the exit code and the log."""


class Experiment(Struct, frozen=True):
    """Where the runs of an experiment lie and what they have in common; `extra` are settings of all arms."""

    base: str
    cold_start: str
    folder: Path
    steps: int
    extra: tuple[str, ...] = ()

    @property
    def cold(self) -> Run:
        """The run that makes the starting policy of all arms and seeds."""
        return self._run(self.cold_start, "cold-start", [])

    def run(self, arm: Arm, seed: int) -> Run:
        """An arm's run from the cold start; critic-only steps come on top of the policy's."""
        start = self.cold.config
        policy = start.run_dir / "checkpoints" / f"step-{start.steps:06d}"
        settings = [
            f"seed={seed}",
            f"steps={self.steps + arm.pretrain}",
            "cold_start=",
            f'model={{type = "path", path = "{policy}"}}',
            *self.extra,
            *arm.settings,
        ]
        return self._run(self.base, f"{arm.name}-s{seed}", settings)

    def _run(self, path: str, name: str, settings: list[str]) -> Run:
        settings = [f'runs="{self.folder}"', f'name="{name}"', *settings]
        return Run(path=path, settings=tuple(settings), config=load_config(path, settings))


class Run(Struct, frozen=True):
    """One run: a config file and its overrides."""

    path: str
    settings: tuple[str, ...]
    config: Config

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def command(self) -> str:
        """What a person would type."""
        return shlex.join(["headrace", *self.arguments(resume=False)])

    def arguments(self, *, resume: bool) -> list[str]:
        """`headrace`'s arguments."""
        sets = [part for setting in self.settings for part in ("--set", setting)]
        return ["launch", self.path, *sets, "--no-view", *(["--resume"] if resume else [])]

    @property
    def done(self) -> bool:
        return complete(self.config)

    @property
    def console(self) -> Path:
        """What the run says goes there."""
        return self.config.run_dir.parent / "console" / f"{self.name}.log"

    def execute(self) -> None:
        """Runs it to its end, or continues it; nothing where it is done. Raises `RunFailed`."""
        if self.done:
            return
        resume = log_path(self.config).exists()
        self.console.parent.mkdir(parents=True, exist_ok=True)
        with self.console.open("ab") as console:
            command = [sys.executable, "-m", "workers.cli", *self.arguments(resume=resume)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT)
            try:
                code = process.wait()
            except KeyboardInterrupt:  # the run got it too, and ends its own processes
                process.wait(STOP_S)
                raise
        if code != 0:
            raise RunFailed(f"{self.name}: exit code {code}; its words are in {self.console}:\n{_tail(self.console)}")


def execute_all(runs: Sequence[Run]) -> list[str]:
    """Executes the runs in order, saying so; a run that fails is skipped. Returns what failed."""
    failed = []
    for number, run in enumerate(runs, start=1):
        if run.done:
            continue
        began = time.monotonic()
        print(f"[{number}/{len(runs)}] {run.command}", flush=True)
        try:
            run.execute()
        except RunFailed as error:
            failed.append(str(error))
            print(error, file=sys.stderr, flush=True)
        else:
            print(f"    done in {time.monotonic() - began:.0f} s", flush=True)
    return failed


def _tail(path: Path, lines: int = 12) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])
