"""How a launch ends badly: the errors, and what they tell about the role that brought it about."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from workers.roles import is_refusal
from workers.supervise import Exit

ENDED = "ended: "
"""Before the error that ended a run, in the launcher's diary."""
LOW_BYTES = 16 << 20
"""With less free than this, a run that ended says how full its disk is."""


class LaunchError(RuntimeError):
    """The run ended before it was complete; says which role, why, and where its log is."""


class LaunchRefused(LaunchError):
    """A role found input that it cannot use, or no room to write: starting it anew cannot help."""


class Stopped(Exception):
    """A signal asked for the end."""


def role_failure(exit: Exit, what: str, *, log: Path, run_dir: Path, again: str | None) -> LaunchError:
    """The error for a role that ended the run: `what` happened, the end of its `log`, and the command that continues
    the run, where there is something to continue."""
    told = exit.tail.splitlines()
    told = [line for line in exit.refusal.splitlines() if line not in told] + told  # a full disk takes no log
    lines = "".join(f"\n  | {line}" for line in told)
    refused, resume = is_refusal(exit), ""
    if again is not None:
        then = "once that is put right, continue with" if refused else "continue with"
        resume = f"\nwhat is trained so far is kept; {then}: {again}"
    kind = LaunchRefused if refused else LaunchError
    return kind(f"{what} ({exit.how}); the end of {log}:{lines}{_room(run_dir)}{resume}")


def no_room(error: OSError, run_dir: Path, again: str) -> LaunchRefused:
    """The error for a launcher that cannot write into the run's folder."""
    return LaunchRefused(f"{run_dir}: {error}{_room(run_dir)}\nfree space there, then continue with: {again}")


def _room(run_dir: Path) -> str:
    free = shutil.disk_usage(run_dir).free
    return f"\nthe file system of {run_dir} has {free / 2**20:.1f} MiB free" if free < LOW_BYTES else ""


def command_again(path: str, overrides: list[str], where: tuple[str, ...]) -> str:
    """The command line that continues a run."""
    options = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["headrace", "launch", path, *where, *options, "--resume"])
