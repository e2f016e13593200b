"""Many faults over as many runs as they need, and what is checked after each run: its log, its figures, its weights."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil

from engine.config import Config, load_config
from tools.faults.drill import LOOK_S, Drill, Fault, Outcome, possible
from tools.faults.far import FAR, LISTEN, Far, joined
from tools.faults.network import Network
from tools.faults.observer import Observer
from tools.faults.processes import alive, cut_power, gone, naming, roles_of, send, tree
from tools.faults.result import Result, Run, Settings
from workers.audit import audit

Then = Literal["resume", "finish", "abandon"]

END_S = 60.0
"""How long a launcher that was told to end may take."""


class Campaign:
    """`run()` makes the faults; it ends in `limit_s` at the latest, and leaves no process behind."""

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        *,
        tell: Callable[[], None],
        network: Network | None = None,
        earlier: Result | None = None,
    ) -> None:
        """`tell` is called whenever `result` has got longer. `network` is what cuts need. `earlier` is how far the campaign
        had got when it was stopped: its faults count, and its last run goes on if it was not checked yet."""
        self.settings, self.say, self.tell, self.network = settings, say, tell, network
        self.chance = random.Random(settings.seed)
        self.deadline = time.monotonic() + settings.limit_s
        self.result = earlier or Result(outcomes=[], runs=[])
        self.faults: list[Fault] = []
        self.base = load_config(settings.config, settings.overrides)
        kinds = [outcome.fault.kind for outcome in self.result.outcomes]
        self.power_left = max(0, settings.power_cuts - kinds.count("power"))
        self.cuts_left = max(0, settings.cuts - kinds.count("cut"))
        self.kills_left = max(0, settings.kills - kinds.count("kill") - kinds.count("stop"))

    @property
    def left(self) -> int:
        """Faults that are still to be made."""
        return self.kills_left + self.cuts_left + self.power_left

    def run(self) -> Result:
        while (self.left or self._unchecked()) and time.monotonic() < self.deadline:
            made, before = len(self.result.outcomes), self.left
            self._one_run(self.next_name())
            if before and len(self.result.outcomes) == made:
                self.result.runs[-1].violations.append("the run ended before anything could be done to it")
                break
        self.result.unmade = self.left
        return self.result

    def next_name(self) -> str:
        """Of the run that is to be made, or to be gone on with."""
        number = len(self.result.runs) + (not self._unchecked())
        return f"{self.base.name}-{self.settings.seed}-{number}"

    def _unchecked(self) -> bool:
        """Whether the last run is one that an earlier campaign was stopped in."""
        return bool(self.result.runs) and not self.result.runs[-1].checked

    def _one_run(self, name: str) -> None:
        listen = [LISTEN] if self.network is not None else []
        overrides = [*self.settings.overrides, *listen, f'runs="{self.settings.out}"', f'name="{name}"']
        config, began = load_config(self.settings.config, overrides), time.monotonic()
        if self._unchecked():
            self.result.runs.pop()
        run, observer = Run(name, 0, None, 0.0, checks={}, violations=[]), Observer(config.run_dir)
        self.result.runs.append(run)
        then: Then = "resume"
        while then == "resume":
            with self._launched(config, overrides, run) as launcher, self._far(config, overrides, launcher) as far:
                then = self._faults_of(config, launcher, observer, run, far)
                if then == "finish":
                    run.code = self._to_its_end(launcher)
        observer.close()
        run.seconds, run.steps = time.monotonic() - began, observer.step()
        if run.steps:
            self._check(config, run)
        if run.code != 0:
            how = "was ended for want of time" if run.code is None else f"launch ended with exit code {run.code}"
            run.violations.append(f"{how}, see {self._output(config)}")
        run.checked = True
        self.tell()

    @contextmanager
    def _far(self, config: Config, overrides: list[str], launcher: subprocess.Popen[bytes]) -> Iterator[Far | None]:
        """The generator that can be cut off, while this launch lasts; None where no network is to be cut."""
        if self.network is None:
            yield None
            return
        process = psutil.Process(launcher.pid)
        with joined(self.network, config, overrides, process, lambda: launcher.poll() is not None) as far:
            yield far

    def _faults_of(
        self, config: Config, launcher: subprocess.Popen[bytes], observer: Observer, run: Run, far: Far | None
    ) -> Then:
        """Makes faults until the run nears its end or none is left; what is to be done with the run then."""

        def over() -> bool:
            return launcher.poll() is not None or observer.step() >= config.steps

        process = psutil.Process(launcher.pid)
        drill = Drill(process, observer, over, recover_s=self.settings.recover_s, far=far)
        while self.left and self._progressed(drill, config):
            if self.power_left and self.chance.random() < self.power_left / self.left:
                self.power_left -= 1
                self._cut_power(process, observer, run)
                return "resume"
            outcome = drill.run(self._next_fault(process))
            self._keep(outcome)
            if any(text.startswith("waited") for text in outcome.violations):
                return "abandon"
        if (cut := self._cut_outcome(run)) is not None:
            self._await_return(cut, drill)
        return "finish"

    def _await_return(self, cut: Outcome, drill: Drill) -> None:
        """After a power cut that no other fault follows, or whose run ended before one did."""
        deadline = time.monotonic() + drill.recover_s
        while cut.step_s is None and not drill.over() and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            self._see_cut_through(drill.observer)
        self._see_cut_through(drill.observer)
        if cut.step_s is None:
            cut.violations.append("the run did not go on")
            self._tell(cut)

    def _progressed(self, drill: Drill, config: Config) -> bool:
        """Waits for two more steps and a random while; False when too little of the run is left, or too little time."""
        observer, deadline = drill.observer, time.monotonic() + drill.recover_s
        first, began = observer.step(), time.time()
        while observer.step() < first + 2 or not self._all_there(config, drill, began):
            self._see_cut_through(observer)
            if drill.over() or time.monotonic() > min(deadline, self.deadline):
                return False
            time.sleep(LOOK_S)
        self._see_cut_through(observer)
        until = time.monotonic() + self.chance.uniform(0.0, self.settings.pause_s)
        while time.monotonic() < until and not drill.over():
            time.sleep(LOOK_S / 2)
        return not drill.over() and observer.step() < config.steps - max(5, config.steps // 10)

    def _all_there(self, config: Config, drill: Drill, since: float) -> bool:
        """The launcher has every role, and the far generator, if there is one, has done work since then."""
        ranks = config.learner.ranks if config.learner.ranks > 1 else 0
        generators = config.generator.count if config.generator is not None else 0
        if drill.far is not None and drill.observer.worked_after(FAR, since) is None:
            return False
        return len(roles_of(drill.launcher)) == 2 + ranks + generators + config.reward.count

    def _next_fault(self, launcher: psutil.Process) -> Fault:
        if self.cuts_left and self.chance.random() < self.cuts_left / (self.cuts_left + self.kills_left):
            self.cuts_left -= 1
            return Fault("cut", FAR, self.settings.cut_s)
        self.kills_left -= 1
        if not self.faults:
            self.faults = possible(sorted(roles_of(launcher)), self.settings.stops_s, self.chance)
        return self.faults.pop()

    # --- power cuts --------------------------------------------------------------------------------------------------

    def _cut_power(self, launcher: psutil.Process, observer: Observer, run: Run) -> None:
        """Kills everything, or every other time the launcher alone, whose roles are to end by themselves meanwhile."""
        target = ("everything", "launcher")[sum(o.fault.kind == "power" for o in self.result.outcomes) % 2]
        outcome = Outcome(run.name, Fault("power", target), observer.step(), violations=[])
        self.cut_at = time.time()
        if target == "launcher":
            send([launcher], signal.SIGKILL)
        else:
            outcome.violations += [f"pid {process.pid} survived SIGKILL" for process in cut_power(launcher)]
        self.result.outcomes.append(outcome)
        self.tell()

    def _cut_outcome(self, run: Run) -> Outcome | None:
        last = self.result.outcomes[-1] if self.result.outcomes else None
        return last if last is not None and last.fault.kind == "power" and last.run == run.name else None

    def _see_cut_through(self, observer: Observer) -> None:
        """Fills in when the run went on after the last power cut."""
        last = self.result.outcomes[-1] if self.result.outcomes else None
        if last is None or last.fault.kind != "power" or last.step_s is not None:
            return
        if (committed := observer.committed_after(self.cut_at)) is not None:
            last.back_s = last.step_s = committed - self.cut_at
            self._tell(last)

    # --- a run's beginning and end ---------------------------------------------------------------------------------------

    @contextmanager
    def _launched(self, config: Config, overrides: list[str], run: Run) -> Iterator[subprocess.Popen[bytes]]:
        """A launcher, ended with everything below it when the block is left."""
        config.run_dir.mkdir(parents=True, exist_ok=True)
        options = [part for override in overrides for part in ("--set", override)]
        command = [
            *(sys.executable, "-m", "workers.cli", "launch", self.settings.config, "--no-view", "--resume"),
            *options,
        ]
        with self._output(config).open("ab") as output:
            launcher = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            yield launcher
        finally:
            last = self._cut_outcome(run)
            if last is None or last.step_s is not None or last.fault.target != "launcher":
                self._end(launcher, config, run)
            else:
                launcher.wait(END_S)  # killed; what it started may end while the next one starts

    def _end(self, launcher: subprocess.Popen[bytes], config: Config, run: Run) -> None:
        if launcher.poll() is None:
            everything = tree(psutil.Process(launcher.pid))
            launcher.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(END_S)
            if launcher.poll() is None:
                launcher.kill()
                launcher.wait(END_S)
            send(gone(everything, 5.0), signal.SIGKILL)
        left = gone(naming(f"{config.run_dir / 'config.toml'}"), 10.0)
        run.violations += [
            f"left behind after the end: pid {p.pid}, {' '.join(p.cmdline())[:120]}" for p in alive(left)
        ]
        send(left, signal.SIGKILL)

    def _to_its_end(self, launcher: subprocess.Popen[bytes]) -> int | None:
        """The exit code; None when the time is over before."""
        try:
            return launcher.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def _check(self, config: Config, run: Run) -> None:
        for check in audit(config.run_dir):
            run.checks[check.name] = check.counted
            run.violations += [f"audit, {check.name}: {text}" for text in check.violations]
        command = [sys.executable, "-m", "workers.cli", "replay", str(config.run_dir), "--verify"]
        try:
            found = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=self.settings.limit_s
            )
        except subprocess.TimeoutExpired:
            run.violations.append(f"replay --verify was not done after {self.settings.limit_s:.0f} s")
            return
        run.verified = (found.stdout.strip().splitlines() or [""])[-1]
        if found.returncode != 0:
            run.violations.append(
                f"replay --verify: exit code {found.returncode}: {(found.stdout + found.stderr)[-500:]}"
            )

    def _output(self, config: Config) -> Path:
        return config.run_dir / "launch.out"

    def _keep(self, outcome: Outcome) -> None:
        self.result.outcomes.append(outcome)
        self._tell(outcome)
        self.tell()

    def _tell(self, outcome: Outcome) -> None:
        made = len(self.result.outcomes)
        back, step = (f"{s:.1f} s" if s is not None else "-" for s in (outcome.back_s, outcome.step_s))
        tokens = f", {outcome.tokens:.0f} tokens meanwhile" if outcome.tokens is not None else ""
        stopped = f" for {outcome.fault.stop_s:.0f} s" if outcome.fault.kind in ("stop", "cut") else ""
        self.say(
            f"{made:3d}  {outcome.run} step {outcome.step}: {outcome.fault.kind} {outcome.fault.target}{stopped}: works after "
            f"{back}, next step after {step}{tokens}"
        )
        if (severed := outcome.severed) is not None:
            current = f"{severed.current_s:.1f} s" if severed.current_s is not None else "-"
            self.say(
                f"     held {severed.held} tickets; {severed.steps} steps and {severed.reissued} samples issued anew meanwhile; "
                f"{severed.refused} late results refused; current weights after {current} by {severed.connects} connections"
            )
        for text in outcome.violations:
            self.say(f"     VIOLATION {text}")
