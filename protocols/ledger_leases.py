"""Who works on what, and until when: the workers of a ledger and the samples that each of them holds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator

from protocols.ledger_rows import Group, Issue, Pace, Sample, Score, Worker


class Leases:
    """`groups` is the ledger's own table; a sample that is out to a worker is in that worker's `outstanding`."""

    def __init__(self, pace: Pace, groups: dict[int, Group]) -> None:
        self._pace, self._groups = pace, groups
        self.workers: dict[str, Worker] = {}
        self._earliest = math.inf
        """No lease ends before this; renewals only raise their ends, so that most turns need not look at each of them."""

    # --- workers ------------------------------------------------------------------------------------------------------

    def joined(self, worker: str, role: str, capacity: int) -> list[tuple[int, int]]:
        """One that comes back under its name keeps its leases, and says anew what it serves: it may be another process.
        Returns the leases that end, as of one of another role."""
        known = self.workers.get(worker)
        if known and known.role == role:
            known.capacity, known.suspect, known.version = capacity, False, None
            return []
        ended = self.left(worker)
        self.workers[worker] = Worker(role, capacity)
        return ended

    def left(self, worker: str) -> list[tuple[int, int]]:
        """Returns the samples that it held."""
        gone = self.workers.pop(worker, None)
        return sorted(gone.outstanding) if gone else []

    def alive(self, worker: str, held: Iterable[tuple[int, int]], now: float, *, version: int | None) -> None:
        """Renews the leases of the (group, fence) pairs that a generator names, and notes which weights it serves."""
        known = self.workers.get(worker)
        if known is None:
            return
        known.suspect, known.version = False, version
        names = set(held)
        for group, index in known.outstanding:
            sample = self._groups[group].samples[index]
            if (group, sample.fence) in names:
                sample.deadline = now + self._pace.lease_s

    def free_generators(self) -> int:
        """Samples that generators could start now."""
        return sum(worker.free for worker in self.workers.values() if worker.role == "generator")

    # --- leases -------------------------------------------------------------------------------------------------------

    def find(self, worker: str, group: int, index: int, fence: int) -> tuple[Sample | None, str | None]:
        """The sample that this worker holds under this fence, or why it does not."""
        known = self._groups.get(group)
        if known is None or not 0 <= index < len(known.samples):
            return None, f"group {group} sample {index} is not outstanding"
        sample = known.samples[index]
        if sample.stage != "leased" or sample.fence != fence or sample.worker != worker:
            return (
                None,
                f"group {group} sample {index}: fence {fence} is not the current one ({sample.stage}, fence {sample.fence})",
            )
        return sample, None

    def end(self, worker: str, group: int, index: int) -> None:
        """The worker holds this sample no longer; nothing happens when it did not, or is gone."""
        if worker in self.workers:
            self.workers[worker].outstanding.discard((group, index))

    def expired(self, now: float) -> Iterator[tuple[int, int]]:
        """Ends the leases that ran out. Their workers get nothing more until they are heard of."""
        if now <= self._earliest:
            return
        for worker in self.workers.values():
            late = [(g, i) for g, i in worker.outstanding if self._groups[g].samples[i].deadline < now]
            for group, index in late:
                worker.outstanding.discard((group, index))
                worker.suspect = True
                yield group, index
        held = (self._groups[g].samples[i].deadline for w in self.workers.values() for g, i in w.outstanding)
        self._earliest = min(held, default=math.inf)

    def issue(self, waiting: deque[int], now: float) -> Iterator[Issue]:
        """Gives the new samples of the `waiting` groups to generators, the emptiest first."""
        generators = {name: w for name, w in self.workers.items() if w.role == "generator"}
        while waiting and generators:
            group = self._groups[waiting[0]]
            wanted = [i for i, s in enumerate(group.samples) if s.stage == "new"]
            if not wanted:
                waiting.popleft()
                continue
            name = max(generators, key=lambda n: (generators[n].free / max(1, generators[n].capacity), n))
            worker = generators[name]
            # A group stays together, for its prompt is then prefilled once, unless it exceeds what the worker can ever hold.
            if worker.free < len(wanted) and (worker.outstanding or worker.free == 0):
                return
            given = wanted[: worker.free]
            group.fence += 1
            for index in given:
                sample = group.samples[index]
                sample.stage, sample.fence, sample.worker = "leased", group.fence, name
                sample.deadline = now + self._pace.lease_s
                self._earliest = min(self._earliest, sample.deadline)
                worker.outstanding.add((group.id, index))
            if len(given) == len(wanted):
                waiting.popleft()
            yield Issue(name, group.id, given, group.fence, group.min_version)

    def score(self, waiting: deque[tuple[int, int]], now: float) -> Iterator[Score]:
        """Gives the `waiting` samples to reward workers, the one with the most room first."""
        scorers = {name: w for name, w in self.workers.items() if w.role == "reward"}
        while waiting and scorers:
            name = max(scorers, key=lambda n: (scorers[n].free, n))
            if scorers[name].free == 0:
                return
            group, index = waiting.popleft()
            sample = self._groups[group].samples[index]
            sample.stage, sample.worker, sample.deadline = "grading", name, now + self._pace.grade_lease_s
            self._earliest = min(self._earliest, sample.deadline)
            scorers[name].outstanding.add((group, index))
            yield Score(name, group, index, sample.attempt)
