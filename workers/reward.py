"""The reward role: takes responses from the buffer, has them scored in killable processes, sends the grades back.

It keeps nothing: a task that it leaves behind is given to another worker, and a grade counts when the buffer has it.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time

from engine.config import Config
from engine.tasks import named_tasks
from protocols.link import Client, KeysError, LinkError, LinkRefused, LinkTimeout
from protocols.link_messages import Ack, Announce, Goodbye, Hello
from protocols.messages import Grade, GradeTask
from workers.keys import worker_keys
from workers.scorer import ScorerError
from workers.scorer_pool import ScorerPool

JOIN_TIMEOUT_S = 60.0
GONE_S = 300.0
"""How long a buffer that this worker has joined may be silent: time to start it anew after a crash."""

FINISH_S = 5.0
"""After SIGTERM: what is being scored may end for this long; then this long again for the buffer to have every grade."""

IDLE_S, GRADE_S, STATUS_S = 0.5, 0.02, 1.0


def run(config: Config, join: str, name: str | None = None, *, gone_s: float = GONE_S) -> int:
    """Scores until the buffer says goodbye or SIGTERM comes: 0 then; 1 when the buffer is gone; 2 when it refuses this
    worker or the run's tasks cannot be scored, so that starting anew cannot help."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    name = name or f"reward-{socket.gethostname()}-{os.getpid()}"[:80]
    grades: queue.SimpleQueue[Grade] = queue.SimpleQueue()
    pool = ScorerPool(named_tasks(config.tasks), config.reward, grades.put)
    try:
        pool.start()
    except ScorerError as error:
        return _fail(name, error, 2 if error.refused else 1)
    try:
        hello = Hello(
            role="reward",
            name=name,
            host=socket.gethostname(),
            pid=os.getpid(),
            capacity=config.reward.scorers * config.reward.tasks_per_scorer,
        )
        client = Client(join, hello, timeout_s=JOIN_TIMEOUT_S, keys=worker_keys(config, "reward"))
        try:
            return Reward(client, pool, grades, stop, gone_s=gone_s).serve()
        finally:
            client.close()
    except LinkError as error:
        return _fail(name, error, 2 if isinstance(error, LinkRefused | KeysError) else 1)
    finally:
        pool.close(0.0)


class Reward:
    """The loop of a reward worker. Only its thread touches the link; `grades` is where the pool's threads put theirs."""

    def __init__(
        self,
        client: Client,
        pool: ScorerPool,
        grades: queue.SimpleQueue[Grade],
        stop: threading.Event,
        *,
        gone_s: float,
    ) -> None:
        self.client, self.pool, self.grades, self.stop, self.gone_s = client, pool, grades, stop, gone_s
        self.over = False
        self.refused = 0
        self.status_due = 0.0

    def serve(self) -> int:
        """Returns 0 when the run is over or this worker was told to stop. Raises `LinkTimeout` when the buffer is gone."""
        while not self.over and not self.stop.is_set():
            working = self.pool.busy + self.pool.queued > 0
            self._take(0.0 if working else IDLE_S)
            self._send_grades(GRADE_S if working else 0.0)
            self._report()
            if self.client.silent_s > self.gone_s:
                raise LinkTimeout(
                    f"waited {self.gone_s:.0f} s for a sign of life from the buffer at {self.client.address}"
                )
        if not self.over:
            self._leave()
        return 0

    def _take(self, timeout_s: float) -> None:
        """Tasks that have arrived go to the pool; waits for the first one only."""
        while (message := self.client.receive(timeout_s)) is not None:
            timeout_s = 0.0
            match message:
                case GradeTask():
                    self.pool.submit(message)
                case Goodbye(reason):
                    print(f"reward: the buffer says goodbye: {reason}", file=sys.stderr, flush=True)
                    self.over = True
                    return
                case Ack():  # of a grade that came too late: its lease ran out and another worker's counted
                    self.refused += 1
                case Announce():
                    continue
                case _:
                    kind = type(message).__name__
                    print(f"reward: got {kind}, expected GradeTask or Goodbye; ignored", file=sys.stderr, flush=True)

    def _send_grades(self, timeout_s: float) -> None:
        """Waits for the next grade, then sends all that there are."""
        try:
            self.client.send(self.grades.get(timeout=timeout_s) if timeout_s else self.grades.get_nowait())
            while True:
                self.client.send(self.grades.get_nowait())
        except queue.Empty:
            return

    def _report(self) -> None:
        if time.monotonic() < self.status_due:
            return
        self.status_due = time.monotonic() + STATUS_S
        busy, queued = self.pool.busy, self.pool.queued
        state = "scores" if busy + queued else "waits for responses to score"
        counters = {**self.pool.counters, "busy": busy, "queued": queued, "refused": self.refused}
        self.client.status(state, counters=counters, owes="" if busy + queued else "buffer")

    def _leave(self) -> None:
        self.client.status("leaves")
        left = self.pool.close(FINISH_S)
        self._send_grades(0.0)
        self.client.flush(FINISH_S)
        self.client.send(Goodbye(f"stopped, {left} responses not scored"))


def _fail(name: str, error: Exception, code: int) -> int:
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return code
