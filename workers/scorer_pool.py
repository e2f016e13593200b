"""Scoring that can hang, crash or eat memory, kept in subprocesses that are killed for it.

A pool has one thread per scorer. The thread hands one job at a time to its process, and when the process fails kills
it with everything it forked and starts another.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable

from engine.config import RewardConfig, Task
from engine.rewards import Score, shaped
from protocols.messages import Grade, GradeTask, Verdict
from workers.score import DETAIL_LIMIT, Setup
from workers.scorer import START_TIMEOUT_S, Died, Expired, Scorer, ScorerError

BACKOFF_LIMIT_S = 10.0
"""The longest pause before a scorer that could not be started is tried again."""


class ScorerPool:
    """`config.scorers` scorers at work on one queue. `deliver` gets each grade, in one of the pool's threads."""

    def __init__(self, tasks: dict[str, Task], config: RewardConfig, deliver: Callable[[Grade], object]) -> None:
        self._tasks, self._config, self._deliver = tasks, config, deliver
        setup = Setup(tasks=tasks, memory_mb=config.memory_mb, parent=os.getpid())
        self._scorers = [Scorer(setup) for _ in range(config.scorers)]
        self._jobs: queue.SimpleQueue[GradeTask | None] = queue.SimpleQueue()
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
        return self._jobs.qsize()

    @property
    def counters(self) -> dict[str, float]:
        """Grades by verdict, scorer-seconds spent on them, and restarts of scorers."""
        with self._lock:
            return dict(self._counters)

    def close(self, finish_s: float) -> int:
        """Lets running jobs end for `finish_s` seconds, kills what is left of them, and returns how many tasks were
        not graded. Nothing is delivered after it."""
        dropped = self._empty_queue()
        for _ in self._threads:
            self._jobs.put(None)
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

    def _empty_queue(self) -> int:
        dropped = 0
        while True:
            try:
                self._jobs.get_nowait()
            except queue.Empty:
                return dropped
            dropped += 1

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
        while not self._closing.is_set() and (task := self._jobs.get()) is not None:
            grade = self._account(scorer, task)
            if not self._closing.is_set():
                self._deliver(grade)
            failures = failures + 1 if grade.verdict == "infra" else 0
            self._closing.wait(min(BACKOFF_LIMIT_S, 0.25 * 2**failures) if failures else 0.0)
            self._revive(scorer)

    def _account(self, scorer: Scorer, task: GradeTask) -> Grade:
        with self._lock:
            self._busy += 1
        grade = self._grade(scorer, task)
        with self._lock:
            self._busy -= 1
            self._counters[grade.verdict] += 1
            self._counters["busy_s"] += grade.seconds
        return grade

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

    def _grade(self, scorer: Scorer, task: GradeTask) -> Grade:
        started = time.monotonic()

        def failed(verdict: Verdict, detail: str) -> Grade:
            return Grade(
                group=task.group,
                sample=task.sample,
                attempt=task.attempt,
                verdict=verdict,
                detail=detail[:DETAIL_LIMIT],
                seconds=time.monotonic() - started,
            )

        if task.task not in self._tasks:
            return failed(
                "infra", f"task {task.task!r}: expected one of {sorted(self._tasks)}; is this the run's config?"
            )
        try:
            if not scorer.idle_and_silent():
                scorer.kill()
                scorer.start()
            started = time.monotonic()
            result = scorer.grade(task.task, task.text, task.answer, self._config.timeout_s)
        except ScorerError as error:
            return failed("infra", str(error))
        except Expired:
            return failed("timeout", f"no score within reward.timeout_s = {self._config.timeout_s:g}")
        except Died as error:
            return failed("crash", f"the scorer {error}")
        if result.error is not None:
            return failed("crash", result.error)
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
            seconds=time.monotonic() - started,
        )
