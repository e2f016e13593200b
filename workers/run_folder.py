"""What the folder of a run says about it, and who may start processes for it."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from engine.config import Config, ConfigError, SftObjective
from protocols.log_schema import LogError, lock_writer
from workers.metrics import read_metrics


def log_path(config: Config) -> Path:
    """The log; that it exists means that the run has begun."""
    return config.run_dir / "rollouts.db"


def refuse_taken(config: Config, *, resume: bool) -> None:
    """Raises `ConfigError` where the folder holds a run that is not to be continued."""
    if log_path(config).exists() and not resume:
        raise ConfigError(
            f"{config.run_dir} holds a run already; continue it with --resume, "
            f"or give this one another name with --set name={config.name}-2"
        )


def being_written(path: Path) -> bool:
    """Whether a process has this log open for writing."""
    try:
        lock_writer(path).close()
    except LogError:
        return True
    return False


def trained(config: Config) -> bool:
    """Whether a run has its last checkpoint."""
    return (config.run_dir / "checkpoints" / f"step-{config.steps:06d}").exists()


def complete(config: Config) -> bool:
    """Whether a run has its last step, its last evaluation and its last checkpoint."""
    history = read_metrics(config.run_dir)
    evaluated = config.eval.prompts == 0 or config.reads_pages or isinstance(config.objective, SftObjective)
    evaluated = evaluated or any(row["eval_step"] == config.steps for row in history.evals)
    return any(row["step"] == config.steps for row in history.steps) and evaluated and trained(config)


def snapshot(config: Config, path: str) -> Path:
    """The config as it is now, kept with the run: a role that is started anew later reads the same."""
    copy = config.run_dir / "config.toml"
    if not (copy.exists() and copy.samefile(path)):
        shutil.copyfile(path, copy)
    return copy


def launcher_of(run_dir: Path) -> int | None:
    """The pid of the launcher that runs this folder on this machine; None when none does."""
    try:
        with (run_dir / "launch.lock").open(encoding="utf-8") as lock:
            pid = lock.read().strip()
            if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
                return None
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given only when that pid is somebody else's by now
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int(pid)
    return None


def own(lock: IO[str], run_dir: Path) -> None:
    """Holds the run directory until the file closes. Raises `ConfigError` when another launcher does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise ConfigError(f"{run_dir} is run by another launcher (pid {lock.read().strip() or 'unknown'})") from error
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
