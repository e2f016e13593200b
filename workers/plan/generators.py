"""A generator in simulated time: continuous batching as processor sharing.

Every live sequence makes one token a pass, so all of them move on together: a generator has one counter of passes, a
sequence ends at a known count, and only what changes the number of live sequences has to be looked at.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator

from workers.plan.costs import GeneratorCost


class Sequence:
    """One sample on a generator: it makes its tokens between the passes `begin` and `begin + length`."""

    __slots__ = ("begin", "fence", "generator", "group", "length", "min_version", "prompt", "sample")

    def __init__(self, group: int, sample: int, fence: int, *, length: int, prompt: int, min_version: int) -> None:
        self.group, self.sample, self.fence = group, sample, fence
        self.length, self.prompt, self.min_version = length, prompt, min_version
        self.begin = 0.0
        self.generator: SimulatedGenerator | None = None

    def versions(self) -> Iterator[tuple[int, float]]:
        """Runs of (weights version, tokens) of a finished sequence."""
        if self.generator is not None:
            yield from self.generator.versions(self.begin, self.begin + self.length)


class SimulatedGenerator:
    """`advance` to a time before anything else is asked; times in seconds."""

    def __init__(self, name: str, cost: GeneratorCost) -> None:
        self.name, self.cost = name, cost
        self.version = -1
        self.busy_seconds = self.slot_seconds = 0.0
        """Time with at least one live sequence; the integral of the live sequences."""
        self.tokens = 0.0
        self._pass_seconds = cost.pass_seconds().tolist()
        self._now = self._stalled_until = 0.0
        self._passes = 0.0
        self._live: list[tuple[float, int, Sequence]] = []
        self._waiting: deque[Sequence] = deque()
        self._prompts: dict[tuple[int, int], int] = {}
        self._adopted: list[float] = []
        self._versions: list[int] = []
        self._order = 0

    # --- time ------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Decodes up to `now`; nothing may end before that (see `due`)."""
        live = len(self._live)
        if live:
            self.busy_seconds += now - self._now
            self.slot_seconds += live * (now - self._now)
            decoding = now - max(self._now, self._stalled_until)
            if decoding > 0:
                passes = decoding / self._pass_seconds[live]
                self._passes += passes
                self.tokens += passes * live
        self._now = now

    def due(self) -> float | None:
        """When the next sequence ends, if nothing changes; None while none is live."""
        if not self._live:
            return None
        left = max(0.0, self._live[0][0] - self._passes) * self._pass_seconds[len(self._live)]
        return max(self._now, self._stalled_until) + left

    # --- events ----------------------------------------------------------------------------------------------------

    def add(self, sequences: list[Sequence]) -> None:
        """A ticket: queued, and started as far as slots are free."""
        self._waiting.extend(sequences)
        self._prompts[sequences[0].group, sequences[0].fence] = len(sequences)
        self._start()

    def finished(self) -> list[Sequence]:
        """What has ended by now; what waits takes the slots. Rounding makes up to a millionth of a pass."""
        ended = []
        while self._live and self._live[0][0] <= self._passes + 1e-6:
            ended.append(heapq.heappop(self._live)[2])
        if ended:
            self._start()
        return ended

    def adopt(self, version: int) -> None:
        """New weights between two passes; sequences go on."""
        self.version = version
        self._adopted.append(self._passes)
        self._versions.append(version)
        stall = self.cost.adopt_seconds
        if self.cost.recompute:
            made = sum(self._passes - s.begin + s.prompt for _, _, s in self._live)
            stall += made * self.cost.prefill_token_seconds
        self._stall(stall)
        self._start()

    def versions(self, begin: float, end: float) -> Iterator[tuple[int, float]]:
        """Runs of (version, tokens) of a sequence that was live between these passes."""
        place = max(0, bisect_right(self._adopted, begin) - 1)
        while begin < end:
            until = min(end, self._adopted[place + 1]) if place + 1 < len(self._adopted) else end
            if until > begin:
                yield self._versions[place], until - begin
            begin, place = until, place + 1

    def _stall(self, seconds: float) -> None:
        if seconds > 0:
            self._stalled_until = max(self._now, self._stalled_until) + seconds

    def _start(self) -> None:
        """The oldest that may start on these weights take the free slots; a ticket's prompt is computed with its first."""
        if self.version < 0:
            return
        kept: list[Sequence] = []
        while self._waiting and len(self._live) < self.cost.slots:
            sequence = self._waiting.popleft()
            if sequence.min_version > self.version:
                kept.append(sequence)
                continue
            if self._prompts.pop((sequence.group, sequence.fence), 0):
                self._stall(sequence.prompt * self.cost.prefill_token_seconds)
            sequence.begin, sequence.generator = self._passes, self
            self._order += 1
            heapq.heappush(self._live, (self._passes + sequence.length, self._order, sequence))
        self._waiting.extendleft(reversed(kept))
