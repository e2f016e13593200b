"""Breaks a real run in eight ways, one after another, and asks each time what holds it up.

    bash tools/why                       # all eight
    bash tools/why reward full-disk      # some of them

Six faults are done to one small pipeline whose roles are processes of their own, and undone again; a full disk and data
that are exhausted end a launch of their own. Exit code 1 when `headrace status RUN --why` did not name one of them.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from msgspec import Struct

from tools.faults.ended import NoSmallDisk, exhaust_data, fill_disk
from tools.faults.mood import Mood
from tools.faults.standing import Answer, Standing, ask_why

NAMED_S = 45.0
"""How long a fault may go unnamed: until groups that are ready are trained, and 10 s until who was killed counts as gone."""
BROADCAST_S = 60.0
"""How long a generator that is to be stopped inside a broadcast is waited for."""


class Fault(Struct, frozen=True):
    """`says` must be found in the answer's text, and `owes` be whom it names."""

    name: str
    what: str
    says: str
    owes: str


FAULTS = [
    Fault("learner", "the learner is paused", r"step \d+ waits for a learner: learner-0 is silent for 0:\d\d", "learner-0"),
    Fault(
        "reward", "the reward function hangs",
        r"\d+ responses of step \d+ wait for a grade: reward-0 scores \(since 0:\d\d\); the last grade came 0:\d\d ago", "reward-0",
    ),
    Fault("uninformative", "all responses are right", r"has \d groups: the last \d+ groups were all right or all wrong", "data"),
    Fault(
        "weights", "a generator is stopped inside a broadcast",
        r"learner-0 waits for generator-0 to take version \d+ .*; generator-0 is silent for 0:\d\d", "generator-0",
    ),
    Fault(
        "lag", "max_lag is 0, and the learner is slow",
        r"generators wait for learner-0, which trains .*max_lag = 0 lets nothing more into the system", "learner-0",
    ),
    Fault(
        "generator", "the generator is killed",
        r"step \d+ waits for responses: no generator is there; generator-0 left 0:\d\d ago", "generator",
    ),
    Fault("full-disk", "the disk is full", r"the file system of .* has \d\.\d MiB free; no buffer answers", "disk"),
    Fault(
        "data", "no prompt is left to train on",
        r"no buffer answers; the launch ended at 20.* prompts in a row were skipped, so none is left to train on",
        "whoever launched it",
    ),
]  # fmt: skip


# --- what is done to a pipeline that runs ---------------------------------------------------------------------------------


@contextmanager
def stopped(run: Standing, name: str) -> Iterator[None]:
    run.send(name, signal.SIGSTOP)
    try:
        yield
    finally:
        run.send(name, signal.SIGCONT)


@contextmanager
def scored(run: Standing, mood: Mood) -> Iterator[None]:
    run.mood(mood)
    try:
        yield
    finally:
        run.mood("fair")


@contextmanager
def stopped_in_a_broadcast(run: Standing) -> Iterator[None]:
    deadline = time.monotonic() + BROADCAST_S
    while not _caught_in_a_broadcast(run):
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {BROADCAST_S:.0f} s in vain for generator-0 to be inside a broadcast")
        run.until_it_goes_on()
    try:
        yield
    finally:
        run.send("generator-0", signal.SIGCONT)


def _caught_in_a_broadcast(run: Standing) -> bool:
    """The generator gets so little time that it still receives when the learner has the next version; then none. It goes on
    when the broadcast was over before, or the learner out of groups."""

    def learner_waits_for(*roles: str) -> bool:
        return run.worker("learner-0").get("owes") in roles

    enough = 2 * run.config.buffer.groups_per_step
    run.until(f"{enough} groups in the learner's hand", lambda status: status.ledger["ready"] >= enough)
    with run.slowed("generator-0", stopped_s=0.1, runs_s=0.003):
        run.within(4.0, lambda: learner_waits_for("generator", "buffer"))
    run.send("generator-0", signal.SIGSTOP)
    if run.within(1.0, lambda: not learner_waits_for("generator")):
        run.send("generator-0", signal.SIGCONT)
        return False
    return True


@contextmanager
def without_lag(run: Standing) -> Iterator[None]:
    """The buffer comes back with `max_lag = 0`, and the learner gets a tenth of the time that it needs."""
    run.kill("buffer")
    run.start("buffer", "buffer.max_lag=0")
    try:
        run.until_it_goes_on()
        with run.slowed("learner", stopped_s=0.3, runs_s=0.03):
            yield
    finally:
        run.kill("buffer")
        run.start("buffer")


@contextmanager
def generator_killed(run: Standing) -> Iterator[None]:
    run.kill("generator-0")
    yield  # the next fault starts it anew


INJECTED: dict[str, Callable[[Standing], AbstractContextManager[None]]] = {
    "learner": lambda run: stopped(run, "learner"),
    "reward": lambda run: scored(run, "stuck"),
    "uninformative": lambda run: scored(run, "lenient"),
    "weights": stopped_in_a_broadcast,
    "lag": without_lag,
    "generator": generator_killed,
}
ENDED: dict[str, Callable[[Path], Answer]] = {"full-disk": fill_disk, "data": exhaust_data}


# --- what is said about it ------------------------------------------------------------------------------------------------


def names(fault: Fault, answer: Answer) -> bool:
    return answer.owes == fault.owes and re.search(fault.says, answer.text) is not None


def named(fault: Fault, run: Standing) -> Answer:
    """Does a fault to a pipeline that works, and asks until it is named twice in a row. Returns the last answer in any case."""
    run.until_it_goes_on()
    with INJECTED[fault.name](run):
        deadline, again = time.monotonic() + NAMED_S, False
        while True:
            answer = ask_why(run.run_dir)
            if ((now := names(fault, answer)) and again) or time.monotonic() > deadline:
                return answer
            again = now


def main(
    only: Annotated[list[str] | None, typer.Argument(metavar="FAULT...", help="Some of them, by name.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the runs go; a temporary folder if left out.")] = None,
) -> None:
    """Break a real run in eight ways and see whether `headrace status RUN --why` names each."""
    known = [fault.name for fault in FAULTS]
    if unknown := set(only or []) - set(known):
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    folder = (out or Path(tempfile.mkdtemp(prefix="headrace-why-"))).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the roles are ended too
    asked = [fault for fault in FAULTS if not only or fault.name in only]
    right = 0
    with ExitStack() as parts:
        run: Standing | None = None
        for fault in asked:
            if fault.name in INJECTED and run is None:
                run = parts.enter_context(Standing(folder / "pipeline"))
                run.until_it_goes_on()
            right += _tried(fault, run, folder)
    print(f"{right} of {len(asked)} causes named")
    raise typer.Exit(0 if right == len(asked) else 1)


def _tried(fault: Fault, run: Standing | None, folder: Path) -> bool:
    """Makes a fault and prints what was said; whether it was named."""
    began = time.monotonic()
    try:
        in_run = run if fault.name in INJECTED else None
        answer = ENDED[fault.name](folder / fault.name) if in_run is None else named(fault, in_run)
    except NoSmallDisk as error:
        print(f"NOT MADE: {fault.what}: {error}", flush=True)
        return False
    found = names(fault, answer)
    print(f"{'named' if found else 'NOT NAMED'} after {time.monotonic() - began:.0f} s: {fault.what}", flush=True)
    print(f"    {answer.text}\n    owed by: {answer.owes}", flush=True)
    return found


if __name__ == "__main__":
    typer.run(main)
