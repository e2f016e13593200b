"""`headrace launch CONFIG --on slurm`: writes the job's script, submits it, shows what the job prints, and ends as it does.

Ctrl-C ends the run in order and the job with it; a lost terminal (SIGHUP) leaves the job alone. Slurm starts a job of one
node anew when that is lost. One with more nodes in its first part it leaves running even when the lost one had the job's
script, so whoever follows the job looks for that, and submits another one that continues the run.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from msgspec import Struct

from engine.config import Config, ConfigError, load_config
from workers.check import refuse
from workers.contradictions_placement import refuse_placement
from workers.launch_errors import LaunchError, command_again
from workers.run_folder import refuse_taken, snapshot
from workers.slurm_allocation import slurm
from workers.slurm_script import job_script

LOOK_S = 2.0
"""Between two questions to Slurm about the job."""
READ_S = 0.2
"""Between two looks at what the job has printed."""
SILENT_S = 600.0
"""How long Slurm may not answer while the job is followed."""
CANCEL_S = 90.0
"""How long a job that was told to end may take before it is cancelled for good."""
JOB = "slurm.job"
"""In the run's folder: the id of the job that was submitted last."""
SUBMITS = 4
"""So many jobs in a row may lose their launcher's node."""
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip


class State(Struct, frozen=True):
    """Of a job, as `scontrol` says it."""

    name: str
    reason: str
    code: int
    nodes: str
    host: str

    @property
    def over(self) -> bool:
        return self.name in OVER


def launch_on_slurm(path: str, overrides: list[str], *, resume: bool) -> int:
    """The run's exit code; 130 after Ctrl-C. Raises `ConfigError` for what cannot run or sbatch refuses, `LaunchError` when
    the job ends without its launcher having a say, or Slurm does not answer."""
    config = load_config(path, overrides)
    refuse(config)
    refuse_placement(config, "slurm")
    refuse_taken(config, resume=resume)
    _refuse_running(config)
    logs = config.run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    script = config.run_dir / "slurm.sh"
    file = snapshot(config, path).absolute()
    text = job_script(
        config, file=file, overrides=overrides, resume=resume, directory=Path.cwd(), python=sys.executable
    )
    script.write_text(text, encoding="utf-8")
    again = command_again(path, overrides, ("--on", "slurm"))
    for _ in range(SUBMITS):
        job = slurm("sbatch", "--parsable", str(script)).strip().partition(";")[0]
        (config.run_dir / JOB).write_text(f"{job}\n", encoding="utf-8")
        log = logs / f"slurm-{job}.log"
        print(f"headrace: submitted {script} as Slurm job {job}; its output: {log}", flush=True)
        try:
            return Follower(job, log, again).follow()
        except HostLost as lost:
            print(f"headrace: {lost}; the run is continued in another job", flush=True)
    raise LaunchError(f"{SUBMITS} Slurm jobs in a row lost their launcher's node; continue with: {again}")


def _refuse_running(config: Config) -> None:
    """Raises `ConfigError` while a job of this run waits or runs."""
    try:
        job = (config.run_dir / JOB).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return
    state = job_state(job)
    if state is not None and not state.over:
        raise ConfigError(f"{config.run_dir} is run by Slurm job {job} ({state.name}); `scancel {job}` would end that")


def job_state(job: str) -> State | None:
    """What Slurm knows of a job (the first part of a heterogeneous one); None when it knows nothing any more."""
    try:
        first = slurm("scontrol", "show", "job", job, "--oneliner").partition("\n")[0]
    except ConfigError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    found = dict(re.findall(r"\b(JobState|Reason|ExitCode|NodeList|BatchHost)=(\S*)", first))
    code, _, number = found["ExitCode"].partition(":")
    status = int(code) or 128 * (number != "0") + int(number)
    return State(found["JobState"], found["Reason"], status, found["NodeList"], found.get("BatchHost", ""))


class HostLost(Exception):
    """The job runs on without the node on which its script was."""


class Follower:
    """Shows a job's output until it is over."""

    def __init__(self, job: str, log: Path, again: str) -> None:
        self._job, self._log, self._again = job, log, again
        self._shown = 0
        self._signals: list[int] = []
        self._told = ""
        self._nodes = ""

    def follow(self) -> int:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handlers = {number: signal.signal(number, self._signalled) for number in numbers}
        try:
            return self._follow()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _follow(self) -> int:
        heard, cancelled = time.monotonic(), 0.0
        while True:
            if signal.SIGHUP in self._signals:
                return 128 + signal.SIGHUP
            try:
                state = job_state(self._job)
                heard = time.monotonic()
            except ConfigError as error:
                if time.monotonic() - heard > SILENT_S:
                    raise LaunchError(f"Slurm job {self._job} goes on or not, Slurm does not say: {error}") from error
                self._pause()
                continue
            self._show()
            if state is None or state.over:
                return self._end(state)
            self._tell(state)
            self._look_for_host(state)
            if self._signals and (not cancelled or len(self._signals) > 1 or time.monotonic() - cancelled > CANCEL_S):
                hard = bool(cancelled) or state.name != "RUNNING"
                self._cancel(hard=hard)
                cancelled = time.monotonic()
                del self._signals[1:]
            self._pause()

    def _look_for_host(self, state: State) -> None:
        """Raises `HostLost`, once what is left of the job is cancelled."""
        if state.name != "RUNNING" or state.nodes == self._nodes:
            return
        self._nodes = state.nodes
        if state.host and state.host not in slurm("scontrol", "show", "hostnames", state.nodes).split():
            slurm("scancel", self._job)
            raise HostLost(f"Slurm job {self._job} lost {state.host}, the node of its launcher")

    def _cancel(self, *, hard: bool) -> None:
        """In order first: the launcher lets its generators hand back what they have, and the buffer close its log."""
        print(f"headrace: {'cancelling' if hard else 'ending'} Slurm job {self._job}", flush=True)
        how = [] if hard else ["--batch", "--signal=TERM"]
        try:
            slurm("scancel", *how, self._job)
        except ConfigError as error:  # it may have ended by itself
            print(f"headrace: {error}", file=sys.stderr, flush=True)

    def _end(self, state: State | None) -> int:
        time.sleep(READ_S)
        self._show()
        if self._signals:
            return 128 + self._signals[0]
        if state is None:
            raise LaunchError(f"Slurm forgot job {self._job} before it told how that ended; its output: {self._log}")
        if state.name == "COMPLETED" or (state.name == "FAILED" and state.code in (1, 2, 129, 143)):
            return state.code
        raise LaunchError(
            f"Slurm job {self._job} ended: {state.name} ({state.reason}), its output: {self._log}\n"
            f"what is trained so far is kept; continue with: {self._again}"
        )

    def _tell(self, state: State) -> None:
        text = f"waits ({state.reason})" if state.name == "PENDING" else state.name.lower()
        text += f" on {state.nodes}" if state.name == "RUNNING" else ""
        if text != self._told:
            print(f"headrace: Slurm job {self._job}: {text}", flush=True)
            self._told = text

    def _show(self) -> None:
        """What the job has printed since."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._shown)
                new = file.read()
        except FileNotFoundError:
            return
        self._shown += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()

    def _pause(self) -> None:
        until, signals = time.monotonic() + LOOK_S, len(self._signals)
        while time.monotonic() < until and len(self._signals) == signals:
            time.sleep(READ_S)
            self._show()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
