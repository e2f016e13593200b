"""Feeds the codec, and counts what becomes of it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import psutil

from protocols.codec import Malformed, decode
from tools.fuzzing.mutate import Mutator
from tools.fuzzing.samples import frames_of_samples

WARM_UP = 20_000
"""Messages before memory is measured: until then the interpreter's own pools fill."""
SLOW_S = 1.0


@dataclass
class Found:
    """What was fed, how it ended, and what must not have happened."""

    messages: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    """CPU time of the message that took most."""
    growth_mib: float = 0.0
    """Peak resident memory after the warm-up, above what it was then."""
    outcomes: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


class Memory:
    """This process's resident memory from now on."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._first = self._most = self._process.memory_info().rss

    def look(self) -> float:
        """The highest so far above the first, in MiB."""
        self._most = max(self._most, self._process.memory_info().rss)
        return (self._most - self._first) / (1 << 20)


def fuzz_codec(malformed: int, seed: int) -> Found:
    """Decodes mutated messages until `malformed` of them were refused."""
    mutator, found, memory = Mutator(frames_of_samples(), seed), Found(), Memory()
    refused, began = 0, time.perf_counter()
    while refused < malformed:
        frames = mutator.next()
        before = time.thread_time()  # not by the clock: a busy machine is not the codec's fault
        try:
            decode(frames)
            outcome = "valid all the same"
        except Malformed as error:
            outcome, refused = f"refused: {error.reason}", refused + 1
        except Exception as error:
            outcome = "violation"
            found.violations.append(f"codec: {error!r} for {[frame.hex() for frame in frames]}")
        found.slowest_s = max(found.slowest_s, time.thread_time() - before)
        found.outcomes[outcome] += 1
        found.messages += 1
        if found.messages == WARM_UP:
            memory = Memory()
        if found.messages % 1000 == 0:
            found.growth_mib = memory.look()
        if len(found.violations) > 20:
            break
    found.seconds = time.perf_counter() - began
    if found.slowest_s > SLOW_S:
        found.violations.append(f"codec: one message took {found.slowest_s:.2f} s of CPU time")
    return found
