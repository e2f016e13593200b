"""One fault: done to a run that makes progress, watched until the run is as it was, and judged."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Literal

import psutil
from msgspec import Struct

from tools.faults.observer import Observer, generated, held_back
from tools.faults.processes import LEARNER, alive, gone, roles_of, send, tree
from workers.roles import role_of

Kind = Literal["kill", "stop", "power"]

LOOK_S = 0.1
LEFT_BEHIND_S = 10.0
"""What a killed role had started itself must be gone this long after the role is back."""


class Fault(Struct, frozen=True):
    """`kill` is SIGKILL, `stop` SIGSTOP and after `stop_s` SIGCONT, `power` SIGKILL of everything at once or of the launcher
    alone."""

    kind: Kind
    target: str
    stop_s: float = 0.0

    @property
    def role(self) -> str:
        """What recovery times are collected by."""
        return self.target.rpartition(" ")[0] or role_of(self.target)


class Outcome(Struct):
    """Seconds from the kill (or from SIGCONT) until the target works again, and until the run's next committed step; None
    when the run was over before, or it never came. `tokens` were sampled while the learner was gone."""

    run: str
    fault: Fault
    step: int
    back_s: float | None = None
    step_s: float | None = None
    tokens: float | None = None
    held_back: bool = False
    violations: list[str] = []


def possible(names: Sequence[str], stops_s: Sequence[float], chance: random.Random) -> list[Fault]:
    """Every fault once for each process of a run, shuffled."""
    faults = [Fault("kill", name) for name in names if not (name == LEARNER and f"{LEARNER} rank 0" in names)]
    faults += [
        Fault("stop", name, chance.choice(stops_s)) for name in names if role_of(name) in ("generator", "reward")
    ]
    chance.shuffle(faults)
    return faults


class Drill:
    """`over` says whether the run has ended by itself."""

    def __init__(
        self, launcher: psutil.Process, observer: Observer, over: Callable[[], bool], *, recover_s: float
    ) -> None:
        self.launcher, self.observer, self.over, self.recover_s = launcher, observer, over, recover_s

    def run(self, fault: Fault) -> Outcome:
        """Does a `kill` or a `stop`. A target that is not there is a violation."""
        before = roles_of(self.launcher)
        outcome = Outcome(self.observer.run_dir.name, fault, self.observer.step(), violations=[])
        if fault.target not in before:
            outcome.violations.append(f"{fault.target} is not running; there are {', '.join(before)}")
            return outcome
        target, sampled = before[fault.target], generated(self.observer.status())
        below = tree(target)[1:]
        at = self._inject(fault, target)
        self._await_recovery(fault, outcome, before, at, sampled)
        if outcome.back_s is not None:
            self._judge(fault, outcome, before, below)
        return outcome

    def _inject(self, fault: Fault, target: psutil.Process) -> float:
        """Returns since when the run may recover, in Unix seconds."""
        if fault.kind == "kill":
            at = time.time()
            send([target], signal.SIGKILL)
            return at
        send([target], signal.SIGSTOP)
        deadline = time.monotonic() + fault.stop_s
        while time.monotonic() < deadline and not self.over():
            time.sleep(LOOK_S)
        at = time.time()
        send([target], signal.SIGCONT)
        return at

    def _await_recovery(
        self, fault: Fault, outcome: Outcome, before: dict[str, psutil.Process], at: float, sampled: dict[str, float]
    ) -> None:
        """Fills in the times, and for a learner the tokens that were sampled without it."""
        deadline = time.monotonic() + self.recover_s
        while (outcome.back_s is None or outcome.step_s is None) and not self.over():
            if time.monotonic() > deadline:
                missing = f"{fault.target} to work again" if outcome.back_s is None else "a committed step"
                outcome.violations.append(f"waited {self.recover_s:.0f} s in vain for {missing}")
                return
            time.sleep(LOOK_S)
            if outcome.back_s is None:
                back = self._back(fault, before, at)
                outcome.back_s = None if back is None else back - at
                if role_of(fault.target).startswith(LEARNER):
                    self._count(outcome, sampled)
            if outcome.step_s is None and (committed := self.observer.committed_after(at)) is not None:
                outcome.step_s = committed - at

    def _back(self, fault: Fault, before: dict[str, psutil.Process], at: float) -> float | None:
        """When the target worked again."""
        if fault.kind == "stop":
            return self.observer.worked_after(fault.target, at)
        found = roles_of(self.launcher).get(fault.target)
        if found is None or found == before[fault.target]:
            return None
        if role_of(fault.target) == "buffer":
            return self.observer.joined_after(at)
        return self.observer.worked_after(fault.target, found.create_time())

    def _count(self, outcome: Outcome, sampled: dict[str, float]) -> None:
        """Tokens sampled since before the learner was killed, as the generators' own counters have them."""
        status = self.observer.status()
        if status is not None:
            now = generated(status)
            outcome.tokens = sum(max(0.0, now.get(name, 0.0) - count) for name, count in sampled.items())
            outcome.held_back |= held_back(status)

    def _judge(
        self, fault: Fault, outcome: Outcome, before: dict[str, psutil.Process], below: list[psutil.Process]
    ) -> None:
        own = {name for name in before if name == fault.target or (self._learner(name) and self._learner(fault.target))}
        now = roles_of(self.launcher)
        for name in before.keys() - own:
            if self.over():
                return
            if now.get(name) != before[name]:
                pid = now[name].pid if name in now else "none"
                outcome.violations.append(f"{name} did not stay: pid {before[name].pid} before, {pid} after")
        if fault.kind == "stop" and now.get(fault.target) != before[fault.target]:
            outcome.violations.append(f"{fault.target} was stopped for {fault.stop_s:.0f} s and did not stay")
        if fault.kind == "kill":
            left = gone(below, LEFT_BEHIND_S)
            outcome.violations += [f"{fault.target} left {p.pid} behind" for p in alive(left)]
        if self._learner(fault.target) and not outcome.tokens and not outcome.held_back:
            outcome.violations.append("generators sampled nothing while the learner was gone, and no bound held them")

    def _learner(self, name: str) -> bool:
        return name.split(" ")[0] == LEARNER
