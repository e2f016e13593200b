"""Scoring that can hang, crash or eat memory, kept in subprocesses that are killed for it.

A pool has one thread per scorer. The thread hands one job at a time to its process (all that wait of a task whose scorer is
quicker with many), and when the process fails kills it with everything it forked and starts another.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable

from engine.config import DocumentScore, RewardConfig, Task
from engine.rewards import Score, shaped
from protocols.messages import Grade, GradeTask, Verdict
from workers.score import DETAIL_LIMIT, Result, Setup
from workers.scorer import START_TIMEOUT_S, Died, Expired, Scorer, ScorerError

BACKOFF_LIMIT_S = 10.0
"""The longest pause before a scorer that could not be started is tried again."""


TOGETHER = 64
"""Responses to one task at most that a scorer with a model gets at once."""


def with_model(task: Task) -> bool:
    """Whether scoring asks a model, which is quicker with many responses at once."""
    return isinstance(task.score, DocumentScore) and task.score.utel is not None


class Inbox:
    """Tasks that wait for a scorer, first come, first served."""

    def __init__(self, batched: frozenset[str]) -> None:
        """`batched` names the tasks of which several are taken at once."""
        self._batched = batched
        self._tasks: deque[GradeTask] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, task: GradeTask) -> None:
        with self._changed:
            self._tasks.append(task)
            self._changed.notify()

    def take(self) -> list[GradeTask]:
        """Waits for a task; with it come others of the same name where those are batched. Empty when the inbox is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self._closed)
            if self._closed:
                return []
            taken = [self._tasks.popleft()]
            if taken[0].task in self._batched:
                alike = [task for task in self._tasks if task.task == taken[0].task][: TOGETHER - 1]
                chosen = {id(task) for task in alike}
                self._tasks = deque(task for task in self._tasks if id(task) not in chosen)
                taken += alike
            return taken

    def close(self) -> int:
        """Nothing is taken any more; returns how many tasks were waiting."""
        with self._changed:
            left = len(self._tasks)
            self._tasks.clear()
            self._closed = True
            self._changed.notify_all()
            return left

    def __len__(self) -> int:
        return len(self._tasks)


class ScorerPool:
    """`config.scorers` scorers at work on one queue. `deliver` gets each grade, in one of the pool's threads."""

    def __init__(self, tasks: dict[str, Task], config: RewardConfig, deliver: Callable[[Grade], object]) -> None:
        self._tasks, self._config, self._deliver = tasks, config, deliver
        setup = Setup(tasks=tasks, memory_mb=config.memory_mb, parent=os.getpid())
        batched = frozenset(name for name, task in tasks.items() if with_model(task))
        program = "workers.score_documents" if batched else "workers.score"
        self._scorers = [Scorer(setup, program) for _ in range(config.scorers)]
        self._jobs = Inbox(batched)
        self._started: queue.SimpleQueue[ScorerError | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._counters = dict.fromkeys(("graded", "timeout", "crash", "infra", "busy_s", "restarts"), 0.0)
        self._busy = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Returns when every scorer is ready. Raises `ScorerError` when one cannot be started; the pool is closed then."""
        for number, scorer in enumerate(self._scorers):
            # The thread that starts a process must live as long as it: the kernel ends the process with the thread.
            thread = threading.Thread(target=self._serve, args=(scorer,), name=f"scorer-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        errors = [error for error in (self._started.get(timeout=2 * START_TIMEOUT_S) for _ in self._scorers) if error]
        if errors:
            self.close(0.0)
            raise errors[0]

    def submit(self, task: GradeTask) -> None:
        """Queue a task; its grade comes through `deliver`."""
        self._jobs.put(task)

    @property
    def busy(self) -> int:
        """Scorers that score now."""
        return self._busy

    @property
    def queued(self) -> int:
        """Tasks that no scorer has begun."""
        return len(self._jobs)

    @property
    def counters(self) -> dict[str, float]:
        """Grades by verdict, scorer-seconds spent on them, and restarts of scorers."""
        with self._lock:
            return dict(self._counters)

    def close(self, finish_s: float) -> int:
        """Lets running jobs end for `finish_s` seconds, kills what is left of them, and returns how many tasks were
        not graded. Nothing is delivered after it."""
        dropped = self._jobs.close()
        deadline = time.monotonic() + finish_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._closing.set()
        dropped += self._busy
        deadline = time.monotonic() + START_TIMEOUT_S
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
            for scorer in self._scorers:
                scorer.interrupt()
            for thread in self._threads:
                thread.join(0.1)
        return dropped

    def _serve(self, scorer: Scorer) -> None:
        try:
            scorer.start()
        except ScorerError as error:
            self._started.put(error)
            return
        self._started.put(None)
        try:
            self._work(scorer)
        finally:
            scorer.kill()

    def _work(self, scorer: Scorer) -> None:
        failures = 0
        while not self._closing.is_set() and (tasks := self._jobs.take()):
            grades = self._account(scorer, tasks)
            for grade in grades:
                if not self._closing.is_set():
                    self._deliver(grade)
            failures = failures + 1 if grades[-1].verdict == "infra" else 0
            self._closing.wait(min(BACKOFF_LIMIT_S, 0.25 * 2**failures) if failures else 0.0)
            self._revive(scorer)

    def _account(self, scorer: Scorer, tasks: list[GradeTask]) -> list[Grade]:
        with self._lock:
            self._busy += 1
        grades = self._grade(scorer, tasks)
        with self._lock:
            self._busy -= 1
            for grade in grades:
                self._counters[grade.verdict] += 1
                self._counters["busy_s"] += grade.seconds
        return grades

    def _revive(self, scorer: Scorer) -> None:
        """A new process in place of a dead one, before the next job needs it. What fails here fails again there."""
        if scorer.running or self._closing.is_set():
            return
        with self._lock:
            self._counters["restarts"] += 1
        try:
            scorer.start()
        except ScorerError as error:
            if not self._closing.is_set():
                print(f"reward: {error}", file=sys.stderr, flush=True)

    def _grade(self, scorer: Scorer, tasks: list[GradeTask]) -> list[Grade]:
        """Of responses to one task. Where several fail together each is scored by itself, to find the one at fault."""
        started, name = time.monotonic(), tasks[0].task

        def failed(verdict: Verdict, detail: str) -> list[Grade]:
            return [_failed(task, verdict, detail, (time.monotonic() - started) / len(tasks)) for task in tasks]

        if name not in self._tasks:
            return failed("infra", f"task {name!r}: expected one of {sorted(self._tasks)}; is this the run's config?")
        try:
            if not scorer.idle_and_silent():
                scorer.kill()
                scorer.start()
            started = time.monotonic()
            responses = [(task.text, task.answer) for task in tasks]
            results = scorer.grade(name, responses, self._config.timeout_s * len(tasks))
        except ScorerError as error:
            return failed("infra", str(error))
        except (Expired, Died) as error:
            if len(tasks) > 1:
                return [grade for task in tasks for grade in self._grade(scorer, [task])]
            if isinstance(error, Died):
                return failed("crash", f"the scorer {error}")
            return failed("timeout", f"no score within reward.timeout_s = {self._config.timeout_s:g}")
        seconds = (time.monotonic() - started) / len(tasks)
        return [self._graded(task, result, seconds) for task, result in zip(tasks, results, strict=True)]

    def _graded(self, task: GradeTask, result: Result, seconds: float) -> Grade:
        if result.error is not None:
            return _failed(task, "crash", result.error, seconds)
        score = Score(correct=result.correct, value=result.value, parts=result.parts, reward=result.reward)
        reward, parts = shaped(score, self._config, task.response_tokens)
        return Grade(
            group=task.group,
            sample=task.sample,
            attempt=task.attempt,
            verdict="graded",
            correct=score.correct,
            reward=reward,
            parts=parts,
            detail=result.detail,
            seconds=seconds,
        )


def _failed(task: GradeTask, verdict: Verdict, detail: str, seconds: float) -> Grade:
    return Grade(
        group=task.group,
        sample=task.sample,
        attempt=task.attempt,
        verdict=verdict,
        detail=detail[:DETAIL_LIMIT],
        seconds=seconds,
    )
