"""One launched run: its roles are started in order, watched, started anew, and all ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from types import FrameType

from engine.config import Config, NewModel, UtelModel
from workers.crew import Crew
from workers.keys import provide_keys
from workers.launch_errors import ENDED, LaunchError, Stopped, command_again, role_failure
from workers.metrics import read_metrics
from workers.restarts import Again, GivenUp, Patience, Restarts
from workers.roles import Rendezvous, is_refusal, place, role_command, role_threads, roles, visible_gpus
from workers.run_folder import being_written, log_path, snapshot
from workers.site import Site
from workers.supervise import Exit
from workers.view import View
from workers.worked import worked


class Launch:
    """One run under supervision. `run()` reads top to bottom."""

    def __init__(
        self,
        config: Config,
        path: str,
        overrides: list[str],
        *,
        command: tuple[str, ...],
        patience: Patience,
        live: bool,
        site: Site,
    ) -> None:
        self.config, self.patience, self.live, self.site = config, patience, live, site
        self.overrides = [part for override in overrides for part in ("--set", override)]
        self.again = command_again(path, overrides, site.option)
        self.command = command
        self.logs = config.run_dir / "logs"
        self.supervisor = site.keeper(config, self.logs)
        self.diary = (self.logs / "launch.log").open("a", encoding="utf-8")
        self.file = snapshot(config, path)
        self.gpus = visible_gpus() if site.shares_gpus else []
        self.address = ""
        self.view: View | None = None
        self.signals: list[int] = []
        self.restarts = Restarts(roles(config), patience)
        self.crew = Crew(config, self.supervisor, self.restarts, term_s=patience.term_s, say=self._say)

    def run(self) -> int:
        """Returns the exit code; see `launch`."""
        handlers = {
            number: signal.signal(number, self._signalled) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            self.site.prepare(self.config)
            self._make_model()
            self._start_buffer()
            self.view = View(self.config.run_dir, self.address, steps=self.config.steps, live=self.live)
            self.view.start()
            for role in roles(self.config):
                self._start(role)
            self._watch()
            return self._finish()
        except Stopped:
            return self._stop()
        except LaunchError as error:
            self._note(f"{ENDED}{' '.join(str(error).split())}")
            raise
        finally:
            self.supervisor.stop(self.supervisor.running, grace_s=self._last_grace_s())
            if self.view is not None:
                self.view.close()
            self.diary.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    # --- start -----------------------------------------------------------------------------------------------------

    def _make_model(self) -> None:
        """The folder of a model with fresh weights; made in a process of its own, so that this one needs no torch."""
        folder = self.config.run_dir / "model"
        fresh = isinstance(self.config.model, NewModel) and not self.config.cold_start
        if not fresh and not isinstance(self.config.model, UtelModel):
            return
        if folder.exists() and log_path(self.config).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        self._start("model")
        exit = self._await_exit("model", self.patience.model_s)
        if exit.code != 0:
            raise self._failure(exit, "the new model could not be made")

    def _start_buffer(self) -> None:
        """Starts the buffer and waits for the address that it publishes once it listens."""
        self.address = self.site.bind(self.config)
        address = self.address or self.config.buffer.address
        if (made := provide_keys(self.config, address)) is not None:
            self._say(f"made keys in {made}, for {address} reaches beyond this machine")
        published = self.config.run_dir / "address"
        deadline = time.monotonic() + self.patience.leave_s
        while being_written(log_path(self.config)):  # a launcher that was killed: its roles take a moment to end
            self._pause(deadline, f"an earlier launch's buffer to let go of {log_path(self.config)}")
        published.unlink(missing_ok=True)
        self._start("buffer")
        deadline = time.monotonic() + self.patience.address_s
        while not published.exists():
            for exit in self.supervisor.exits():
                if exit.code >= 0:
                    raise self._failure(exit, "the buffer did not start")
                self._ended(exit)  # somebody killed it, which says nothing of the next one
            for name in self.restarts.due(time.monotonic()):
                self._start(name)
            self._pause(deadline, f"the buffer to write {published}")
        self.address = published.read_text(encoding="utf-8").strip()

    def _start(self, name: str) -> None:
        command = role_command(
            name,
            self.config,
            [str(self.file), *self.overrides],
            address=self.address,
            resume=log_path(self.config).exists(),
            command=self.command,
            rendezvous=self.site.rendezvous(self.config) if name == "learner" else Rendezvous(),
        )
        env = {"OMP_NUM_THREADS": str(role_threads(name, self.config)), "HEADRACE_TETHERED": "1"}
        # A learner that is gone is no news for its subscribers' logs: not with 20 lines of C++ stack each time.
        env["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
        env |= place(self.crew.config, self.gpus).get(name, {})
        self._say(f"{name} started ({self.supervisor.start(name, command, env)})", quiet=True)

    # --- while it runs -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Until the buffer has ended well. Raises `LaunchError` when a role cannot be kept alive, `Stopped` on a signal."""
        while True:
            exits = sorted(self.supervisor.exits(), key=lambda exit: exit.name != "buffer")
            for exit in exits:
                if exit.name == "buffer" and exit.code == 0:
                    return
                if not self.crew.left(exit):
                    self._ended(exit)
            for name in [*self.restarts.due(time.monotonic()), *self.crew.turn()]:
                self._start(name)
            self._pause()

    def _ended(self, exit: Exit) -> None:
        """A role is gone while the run goes on: start it anew after a pause, unless that cannot help."""
        if exit.code == 0 and exit.name != "buffer":  # it was told to: by the buffer, or by whoever wants its place
            at_end = self._last_step() >= self.config.steps
            self._say(f"{exit.name} left after {exit.lived_s:.0f} s, as it was told to", quiet=at_end)
            self.restarts.left(exit.name)
            return
        if is_refusal(exit):
            raise self._failure(exit, f"{exit.name} refused to run")
        since = time.time() - exit.lived_s
        match self.restarts.ended(exit, time.monotonic(), worked=worked(log_path(self.config), exit.name, since)):
            case GivenUp(attempts, []):
                raise self._failure(
                    exit, f"{exit.name} ended {attempts} times, the last time after {exit.lived_s:.0f} s"
                )
            case GivenUp(attempts, others):
                self._say(f"{exit.name} ended {attempts} times; the run goes on with {', '.join(others)}\n{exit.tail}")
            case Again(delay_s, attempt):
                self._say(
                    f"{exit.name} ended ({exit.how}) after {exit.lived_s:.0f} s; it is started anew in {delay_s:.0f} s "
                    f"({attempt} of {self.patience.attempts}), its log: {self.logs / exit.name}.log"
                )

    def _finish(self) -> int:
        """The buffer has ended: the others leave by themselves, the learner after its last checkpoint. 1 when it did not
        write that, else 0."""
        began, code = time.monotonic(), 0
        if self.view is not None:
            self.view.buffer_left()
        while running := self.supervisor.running:
            for exit in self.supervisor.exits():
                if exit.code != 0:
                    self._say(f"{exit.name} left with {exit.how}, its log: {self.logs / exit.name}.log")
                    code = 1 if exit.name == "learner" else code
            waited = time.monotonic() - began
            late = [name for name in running if waited > self._leave_s(name)]
            if late:
                self.supervisor.stop(late, grace_s=self.patience.term_s, hurried=self._hurried)
                self._say(f"still there {waited:.0f} s after the end, ended now: {', '.join(late)}")
                code = 1 if "learner" in late else code
            self._pause()
        return code

    def _leave_s(self, name: str) -> float:
        return self.patience.checkpoint_s if name == "learner" else self.patience.leave_s

    def _stop(self) -> int:
        """Told to end: workers first, for a generator hands back what it has not finished; then the buffer."""
        name = signal.Signals(self.signals[0]).name
        self._say(f"{name}: ending the run's processes (once more: at once)")
        workers = [name for name in self.supervisor.running if name != "buffer"]
        for names in (workers, ["buffer"]):
            killed = self.supervisor.stop(names, grace_s=self.patience.term_s, hurried=self._hurried)
            if killed:
                self._say(f"killed after {self.patience.term_s:.0f} s: {', '.join(killed)}")
        self._say(f"stopped after step {self._last_step()} of {self.config.steps}; continue with: {self.again}")
        return 128 + self.signals[0]

    # --- small parts ---------------------------------------------------------------------------------------------------

    def _await_exit(self, name: str, timeout_s: float) -> Exit:
        deadline = time.monotonic() + timeout_s
        while True:
            for exit in self.supervisor.exits():
                return exit
            self._pause(deadline, f"{name} to end")

    def _pause(self, deadline: float | None = None, what: str = "") -> None:
        """A tenth of a second. Raises `Stopped` after a signal, `LaunchError` naming `what` past the deadline."""
        if self.signals:
            raise Stopped
        if deadline is not None and time.monotonic() > deadline:
            raise LaunchError(f"launch: waited in vain for {what}; logs are in {self.logs}")
        time.sleep(0.1)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def _last_grace_s(self) -> float:
        """For what runs when a launch ends: a worker's last grades and samples have nowhere to go without a buffer."""
        if self._hurried():
            return 0.0
        return self.patience.term_s if "buffer" in self.supervisor.running else self.patience.abandoned_s

    def _hurried(self) -> bool:
        return len(self.signals) > 1

    def _last_step(self) -> int:
        steps = read_metrics(self.config.run_dir).steps
        return int(steps[-1]["step"]) if steps else 0

    def _failure(self, exit: Exit, what: str) -> LaunchError:
        again = self.again if log_path(self.config).exists() else None
        return role_failure(exit, what, log=self.logs / f"{exit.name}.log", run_dir=self.config.run_dir, again=again)

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk ends the buffer, with its own error; not the launcher first
            self.diary.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self.diary.flush()

    def _say(self, text: str, *, quiet: bool = False) -> None:
        self._note(text)
        if self.view is not None and not quiet:
            self.view.say(f"headrace: {text}")
        elif not quiet:
            print(f"headrace: {text}", file=sys.stderr, flush=True)
