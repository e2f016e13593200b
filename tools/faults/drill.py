"""One fault: done to a run that makes progress, watched until the run is as it was, and judged."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Literal

import psutil
from msgspec import Struct

from tools.faults.far import Far
from tools.faults.observer import Observer, Seen, generated, held_back, seen
from tools.faults.processes import LEARNER, alive, gone, roles_of, send, tree
from workers.roles import role_of

Kind = Literal["kill", "stop", "cut", "power"]

LOOK_S = 0.1
HOLDS_S = 10.0
"""How long a cut waits for the far generator to have samples in hand."""
SEEN_S = 20.0
"""How long the buffer may take to say how a generator stands."""
LEFT_BEHIND_S = 10.0
"""What a killed role had started itself must be gone this long after the role is back."""


class Fault(Struct, frozen=True):
    """`kill` is SIGKILL, `stop` SIGSTOP and after `stop_s` SIGCONT, `cut` the network between the far generator and all
    others gone for `stop_s`, `power` SIGKILL of everything at once or of the launcher alone."""

    kind: Kind
    target: str
    stop_s: float = 0.0

    @property
    def role(self) -> str:
        """What recovery times are collected by."""
        return self.target.rpartition(" ")[0] or role_of(self.target)


class Severed(Struct):
    """Tickets that the far generator held when it was cut off, and samples of all generators that were issued anew meanwhile;
    `steps` committed meanwhile, `step` the last of them. After that: seconds until it had these weights, its connections
    to the learner that were made anew, and its late results that were refused."""

    held: int
    reissued: int
    steps: int
    step: int
    current_s: float | None = None
    connects: int = 0
    refused: int = 0


class Outcome(Struct):
    """Seconds from the kill (or from SIGCONT, or from the mended network) until the target works again, and until the run's
    next committed step; None when the run was over before, or it never came. `tokens` were sampled while the learner was
    gone; `severed` says what a cut did."""

    run: str
    fault: Fault
    step: int
    back_s: float | None = None
    step_s: float | None = None
    tokens: float | None = None
    held_back: bool = False
    severed: Severed | None = None
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
    """`over` says whether the run has ended by itself; `far` is who can be cut off."""

    def __init__(
        self,
        launcher: psutil.Process,
        observer: Observer,
        over: Callable[[], bool],
        *,
        recover_s: float,
        far: Far | None = None,
    ) -> None:
        self.launcher, self.observer, self.over, self.recover_s, self.far = launcher, observer, over, recover_s, far

    def _roles(self) -> dict[str, psutil.Process]:
        return roles_of(self.launcher) | (self.far.roles if self.far is not None else {})

    def run(self, fault: Fault) -> Outcome:
        """Does a `kill`, a `stop` or a `cut`. A target that is not there is a violation."""
        before = self._roles()
        outcome = Outcome(self.observer.run_dir.name, fault, self.observer.step(), violations=[])
        if fault.target not in before:
            outcome.violations.append(f"{fault.target} is not running; there are {', '.join(before)}")
            return outcome
        target, sampled = before[fault.target], generated(self.observer.status())
        below = tree(target)[1:]
        at = self._cut(fault, outcome) if fault.kind == "cut" else self._inject(fault, target)
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
        self._last(fault.stop_s)
        at = time.time()
        send([target], signal.SIGCONT)
        return at

    def _cut(self, fault: Fault, outcome: Outcome) -> float:
        """Cuts the far generator off while it has samples in hand; returns when the network was mended, in Unix seconds."""
        if self.far is None:
            raise ValueError(f"{fault.target} cannot be cut off: this run has no far generator")
        deadline = time.monotonic() + HOLDS_S
        while not (before := self._seen(fault.target)).held and time.monotonic() < deadline and not self.over():
            time.sleep(LOOK_S / 4)
        self.far.network.cut()
        try:
            self._last(fault.stop_s)
        finally:
            after, at = self._seen(fault.target), time.time()
            self.far.network.mend()
        outcome.severed = Severed(before.held, after.reissued - before.reissued, after.step - before.step, after.step)
        outcome.severed.connects = before.connects
        return at

    def _seen(self, name: str) -> Seen:
        deadline = time.monotonic() + SEEN_S
        while (status := self.observer.status()) is None and time.monotonic() < deadline and not self.over():
            time.sleep(LOOK_S)
        return seen(status, name)

    def _last(self, seconds: float) -> None:
        """Lets a fault last, unless the run is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.over():
            time.sleep(LOOK_S)

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
                back = self._back(fault, before, at) if fault.kind != "cut" else self._rejoined(fault, outcome, at)
                outcome.back_s = None if back is None else back - at
                if role_of(fault.target).startswith(LEARNER):
                    self._count(outcome, sampled)
            if outcome.step_s is None and (committed := self.observer.committed_after(at)) is not None:
                outcome.step_s = committed - at

    def _back(self, fault: Fault, before: dict[str, psutil.Process], at: float) -> float | None:
        """When the target worked again."""
        if fault.kind == "stop":
            return self.observer.worked_after(fault.target, at)
        found = self._roles().get(fault.target)
        if found is None or found == before[fault.target]:
            return None
        if role_of(fault.target) == "buffer":
            return self.observer.joined_after(at)
        return self.observer.worked_after(fault.target, found.create_time())

    def _rejoined(self, fault: Fault, outcome: Outcome, at: float) -> float | None:
        """When who was cut off had the weights that were current at the mending, and had done work that began after it."""
        severed, now = outcome.severed, self._seen(fault.target)
        if severed is None:
            return None
        if severed.current_s is None and now.version is not None and now.version >= severed.step:
            severed.current_s, severed.connects = time.time() - at, now.connects - severed.connects
        worked = self.observer.worked_after(fault.target, at)
        if worked is None or severed.current_s is None:
            return None
        severed.refused = self.observer.refused_after(fault.target, at)
        return max(worked, at + severed.current_s)

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
        now = self._roles()
        for name in before.keys() - own:
            if self.over():
                return
            if now.get(name) != before[name]:
                pid = now[name].pid if name in now else "none"
                outcome.violations.append(f"{name} did not stay: pid {before[name].pid} before, {pid} after")
        if fault.kind in ("stop", "cut") and now.get(fault.target) != before[fault.target]:
            how = "stopped" if fault.kind == "stop" else "cut off"
            outcome.violations.append(f"{fault.target} was {how} for {fault.stop_s:.0f} s and did not stay")
        if (severed := outcome.severed) is not None and severed.held and not severed.reissued:
            outcome.violations.append(
                f"{fault.target} held {severed.held} tickets while cut off; nothing was issued anew"
            )
        if fault.kind == "kill":
            left = gone(below, LEFT_BEHIND_S)
            outcome.violations += [f"{fault.target} left {p.pid} behind" for p in alive(left)]
        if self._learner(fault.target) and not outcome.tokens and not outcome.held_back:
            outcome.violations.append("generators sampled nothing while the learner was gone, and no bound held them")

    def _learner(self, name: str) -> bool:
        return name.split(" ")[0] == LEARNER
