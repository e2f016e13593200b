"""Where prompts come from: an endless stream of training rows and the held-out rows that it never contains.

The stream is a function of (tasks, seed, index): a run that resumes at index 1,000,000 reads the row there and nothing
before it. Shuffles use raw generator output, which numpy keeps the same from release to release.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from engine.config import AnyTask, DocumentsTask, JsonlTask, LogTask, PagesTask, ReasoningGymTask, Task
from engine.documents.page_rows import PageRows, SyntheticRows
from engine.documents.readings import Reading
from engine.documents.task_rows import DocumentRows
from engine.fields import TaskError
from engine.rows import JsonlRows, ReasoningGymRows, Row
from engine.stored import LogRows, StoredGroup

__all__ = [
    "LogSource",
    "Row",
    "Source",
    "StoredGroup",
    "TaskError",
    "held_out",
    "named_tasks",
    "page_tasks",
    "prompt_tasks",
]

BLOCK = 1000
"""A mixture keeps its weights within each block of this many rows."""

_EPOCHS, _MIXTURE, _HELD_OUT = range(3)


T = TypeVar("T", bound=Task | PagesTask)


def prompt_tasks(tasks: Sequence[AnyTask]) -> list[Task]:
    """Those that have prompts of their own and can be scored: all but stored logs, and pages to be read."""
    return [task for task in tasks if not isinstance(task, LogTask | PagesTask)]


def page_tasks(tasks: Sequence[AnyTask]) -> list[PagesTask]:
    """Those whose pages UTel reads."""
    return [task for task in tasks if isinstance(task, PagesTask)]


def named_tasks(tasks: Sequence[AnyTask]) -> dict[str, Task]:
    """The tasks that can be scored by the name that rows and grade requests carry: the data set's or the file's, numbered
    where it repeats."""
    return _named(prompt_tasks(tasks))


def _named(tasks: Sequence[T]) -> dict[str, T]:
    named: dict[str, T] = {}
    for task in tasks:
        if isinstance(task, ReasoningGymTask):
            name = task.dataset
        else:
            name = "synthetic" if task.path is None else Path(task.path).name.removesuffix(".gz").removesuffix(".jsonl")
        count = 1 + sum(known.rpartition("#")[0] == name or known == name for known in named)
        named[name if count == 1 else f"{name}#{count}"] = task
    return named


class Order:
    """Which row of which table stands at an index of the endless stream: each table's rows in an order that is shuffled
    anew every epoch, the tables mixed by weight."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Raises `TaskError` for weights that cannot be used."""
        self._sizes, self._seed = sizes, seed % 2**64
        self.quotas = _quotas(weights)
        self._mixture: tuple[int, np.ndarray, np.ndarray] | None = None
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(table, row) at `index` >= 0."""
        if index < 0:
            raise IndexError(f"source index {index}: expected at least 0")
        table, local = self._place(index)
        epoch, position = divmod(local, self._sizes[table])
        return table, int(self._epoch(table, epoch)[position])

    def shuffled(self, n: int, *key: int) -> np.ndarray:
        """A permutation of 0..n-1, a function of the seed and the key."""
        generator = np.random.PCG64(np.random.SeedSequence([self._seed, *key]))
        return np.argsort(generator.random_raw(n), kind="stable")

    def _place(self, index: int) -> tuple[int, int]:
        """Which table, and the how manyth of its rows."""
        if len(self.quotas) == 1:
            return 0, index
        block, position = divmod(index, sum(self.quotas))
        if self._mixture is None or self._mixture[0] != block:
            of_table = np.repeat(np.arange(len(self.quotas)), self.quotas)[self.shuffled(BLOCK, _MIXTURE, block)]
            ranks = np.empty(BLOCK, dtype=np.int64)
            for table, quota in enumerate(self.quotas):
                ranks[of_table == table] = np.arange(quota)
            self._mixture = block, of_table, ranks
        _, of_table, ranks = self._mixture
        table = int(of_table[position])
        return table, block * self.quotas[table] + int(ranks[position])

    def _epoch(self, table: int, epoch: int) -> np.ndarray:
        known = self._orders.get(table)
        if known is None or known[0] != epoch:
            known = self._orders[table] = epoch, self.shuffled(self._sizes[table], _EPOCHS, table, epoch)
        return known[1]


class Source:
    """Training rows by index, without end, in the order of `Order`. Prompts in any task's held-out pool are left out of
    all tasks."""

    def __init__(self, tasks: Sequence[Task] | Sequence[PagesTask], seed: int) -> None:
        """Reads the files. Raises `TaskError` for a row, a data set or weights that cannot be used."""
        if not tasks:
            raise TaskError("tasks: got none, expected at least one")
        self._rows = [_open(task, name) for name, task in _named(tasks).items()]
        self._pools = _distinct_pools(self._rows)
        keys = frozenset(row.key for pool in self._pools for row in pool)
        for rows in self._rows:
            rows.exclude(keys)
        self._order = Order([len(rows) for rows in self._rows], [task.weight for task in tasks], seed)

    @property
    def readings(self) -> list[Reading]:
        """What was met where documents were read."""
        return [rows.reading for rows in self._rows if isinstance(rows, PageRows | DocumentRows)]

    def __getitem__(self, index: int) -> Row:
        """The row at `index` >= 0."""
        task, place = self._order[index]
        return msgspec.structs.replace(self._rows[task][place], index=index)

    @property
    def pool(self) -> list[Row]:
        """Every held-out row."""
        return [row for pool in self._pools for row in pool]

    def held_out(self, n: int) -> list[Row]:
        """`n` rows with distinct prompts from the held-out pools, shared out by the tasks' weights as far as those reach.
        Raises `TaskError` when the pools have fewer."""
        sizes = [len(pool) for pool in self._pools]
        if n > sum(sizes):
            raise TaskError(f"eval.prompts: got {n}, expected at most {sum(sizes)} (the tasks' held_out)")
        taken, quotas = [0] * len(sizes), self._order.quotas
        while sum(taken) < n:  # one row at a time to the task that is furthest behind its weight
            open_tasks = [task for task, size in enumerate(sizes) if taken[task] < size]
            taken[min(open_tasks, key=lambda task: (taken[task] + 1) / quotas[task])] += 1
        chosen = [
            pool[place]
            for task, (pool, count) in enumerate(zip(self._pools, taken, strict=True))
            for place in self._order.shuffled(len(pool), _HELD_OUT, task)[:count]
        ]
        return [msgspec.structs.replace(row, index=index) for index, row in enumerate(chosen)]


class LogSource:
    """Stored groups by index, without end, in the order of `Order`; the logs are read as they are asked for."""

    def __init__(self, tasks: Sequence[AnyTask], seed: int, *, without: frozenset[str] = frozenset()) -> None:
        """Finds what the logs have; `without` are prompts' texts that are never drawn. Raises `TaskError`."""
        logs = [task for task in tasks if isinstance(task, LogTask)]
        self.tables = [LogRows(task, without=without) for task in logs]
        self._order = Order([len(table) for table in self.tables], [task.weight for task in logs], seed)

    def __getitem__(self, index: int) -> StoredGroup:
        """The group at `index` >= 0. Raises `TaskError` when its log is damaged."""
        table, place = self._order[index]
        return self.tables[table][place]

    def close(self) -> None:
        for table in self.tables:
            table.close()


def held_out(tasks: Sequence[Task], n: int, seed: int) -> list[Row]:
    """`Source(tasks, seed).held_out(n)`."""
    return Source(tasks, seed).held_out(n)


Table = JsonlRows | ReasoningGymRows | DocumentRows | PageRows | SyntheticRows


def _open(task: Task | PagesTask, name: str) -> Table:
    match task:
        case PagesTask(path=None):
            return SyntheticRows(task, name)
        case PagesTask():
            return PageRows(task, name)
        case JsonlTask():
            return JsonlRows(task, name)
        case DocumentsTask():
            return DocumentRows(task, name)
    return ReasoningGymRows(task, name)


def _distinct_pools(tables: Sequence[Table]) -> list[list[Row]]:
    seen: set[str] = set()
    pools = []
    for table in tables:
        pools.append([row for row in table.pool if row.key not in seen])
        seen.update(row.key for row in table.pool)
    return pools


def _quotas(weights: Sequence[float]) -> list[int]:
    """How many of a block's rows come from each task, at least one. Raises `TaskError` for weights that are not positive."""
    for index, weight in enumerate(weights):
        if not 0 < weight < float("inf"):
            raise TaskError(f"tasks[{index}].weight: got {weight}, expected a positive number")
    exact = [weight / sum(weights) * BLOCK for weight in weights]
    quotas = [max(1, int(share)) for share in exact]
    while sum(quotas) != BLOCK:  # the largest remainders get what is left, the largest quota gives what is too much
        step = 1 if sum(quotas) < BLOCK else -1
        fits = [task for task in range(len(quotas)) if step > 0 or quotas[task] > 1]
        quotas[max(fits, key=lambda task: step * (exact[task] - quotas[task]))] += step
    return quotas
