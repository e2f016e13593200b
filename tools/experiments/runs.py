"""Runs an experiment's arms as runs of the real pipeline, one after the other, each at most once."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from engine.config import Config, ConfigError, load_config
from engine.critic import FOLDER
from tools.experiments.arms import Arm, Task
from workers.run_folder import complete, log_path

STOP_S = 90.0
"""For a run that Ctrl-C ends to leave in order."""


class RunFailed(RuntimeError):
    """`headrace launch` did not end well; names the run, the exit code and the log."""


class Job(Protocol):
    """Something that is executed once."""

    @property
    def command(self) -> str: ...
    @property
    def done(self) -> bool: ...
    def execute(self) -> None: ...


def exit_code(program: str, compare: Callable[[], list[str]]) -> int:
    """What a command that compares runs ends with, once `compare` has come to the runs that failed: 0, 1 when there are some, 2
    for settings that cannot be used, 130 after Ctrl-C. It says so on stderr."""
    try:
        failed = compare()
    except ConfigError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped; the same command goes on", file=sys.stderr)
        return 130
    for text in failed:
        print(f"{program}: {text}", file=sys.stderr)
    return 1 if failed else 0


class Experiment(Struct, frozen=True):
    """Where the runs of a task's tables lie and what they have in common; `extra` are settings of all arms."""

    task: Task
    folder: Path
    steps: int
    extra: tuple[str, ...] = ()

    @property
    def cold(self) -> list[Run]:
        """The runs that make the starting policy of all arms and seeds, each from the end of the one before."""
        runs: list[Run] = []
        for number, path in enumerate(self.task.starts, start=1):
            name = "cold-start" if number == 1 else f"cold-start-{number}"
            runs.append(self._run(path, name, _starting_from(runs[-1]) if runs else []))
        return runs

    @property
    def critic(self) -> list[Job]:
        """What makes the critic of all pretrained arms and seeds: a log of the starting policy, and value pretraining on it.
        Nothing where the task has none."""
        if self.task.collect is None:
            return []
        collect = self._run(self.task.collect, "collect", _starting_from(self.cold[-1]))
        return [collect, CriticPretraining(collect.config.run_dir)]

    @property
    def critic_folder(self) -> Path:
        """Where that critic lies."""
        return self.folder / "collect" / FOLDER

    def run(self, arm: Arm, seed: int) -> Run:
        """An arm's run from the starting policy."""
        settings = [f"seed={seed}", f"steps={self.steps}", *_starting_from(self.cold[-1]), *self.extra, *arm.settings]
        return self._run(self.task.base, f"{arm.name}-s{seed}", settings)

    def _run(self, path: str, name: str, settings: list[str]) -> Run:
        settings = [f'runs="{self.folder}"', f'name="{name}"', *settings]
        return Run(path=path, settings=tuple(settings), config=load_config(path, settings))


def _starting_from(run: Run) -> list[str]:
    """Settings that start from the end of another run."""
    policy = run.config.run_dir / "checkpoints" / f"step-{run.config.steps:06d}"
    return ["cold_start=", f'model={{type = "path", path = "{policy}"}}']


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
        if not self.done:
            _call(self.name, self.arguments(resume=log_path(self.config).exists()), self.console)


class CriticPretraining(Struct, frozen=True):
    """`headrace pretrain-critic` on the log in `folder`."""

    folder: Path

    @property
    def command(self) -> str:
        return shlex.join(["headrace", "pretrain-critic", str(self.folder)])

    @property
    def done(self) -> bool:
        return (self.folder / FOLDER / "config.json").exists()

    def execute(self) -> None:
        """Writes the critic; nothing where it is there. Raises `RunFailed`."""
        if not self.done:
            console = self.folder.parent / "console" / "pretrain-critic.log"
            _call("pretrain-critic", ["pretrain-critic", str(self.folder)], console)


def _call(name: str, arguments: list[str], console: Path) -> None:
    """`headrace` with these arguments; what it says goes to the file `console`. Raises `RunFailed`."""
    console.parent.mkdir(parents=True, exist_ok=True)
    with console.open("ab") as file:
        command = [sys.executable, "-m", "workers.cli", *arguments]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the run got it too, and ends its own processes
            process.wait(STOP_S)
            raise
    if code != 0:
        raise RunFailed(f"{name}: exit code {code}; its words are in {console}:\n{_tail(console)}")


def execute_all(runs: Sequence[Job]) -> list[str]:
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
