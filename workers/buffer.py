"""The buffer: one process that moves bytes between the link and the run's state.

In each turn what has arrived goes to the ledger, what follows from it goes to the log, the log commits, and only then do
acknowledgements, tickets and answers leave: whatever a worker was told is on disk. No torch here.
"""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from pathlib import Path

import msgspec

from engine.config import Config
from protocols import messages as m
from protocols.ledger import Decided, Issue, Score
from protocols.link import Joined, Left, Received, Server
from protocols.link_messages import Announce, Goodbye, Heartbeat, Hello, Status, StatusRequest, Welcome
from workers.keys import buffer_keys
from workers.run_state import RunState, say

TURN_S = 0.02
"""A turn waits this long for events when nothing arrives; leases and plans are looked at that often."""
GONE = 16
"""So many of the workers that left last are named to who asks how the run stands."""
GOODBYE_S = 10.0
"""How long the buffer waits, at the end, for its workers to leave."""


def run(config: Config, *, resume: bool = False, address: str | None = None) -> int:
    """Serves one run until its last step is committed and evaluated. Exit code 0 then, 143 after SIGTERM."""
    buffer = Buffer(config, resume=resume, address=address)
    signal.signal(signal.SIGTERM, lambda *_: buffer.stop())
    try:
        return buffer.serve()
    finally:
        buffer.close()


class Buffer:
    """See the module's docstring. `serve()` is the loop."""

    def __init__(self, config: Config, *, resume: bool = False, address: str | None = None) -> None:
        """Binds the address first: a port that is in use must not leave a log behind."""
        self.config = config
        self.server = Server(
            address or config.buffer.address,
            heartbeat_s=config.buffer.heartbeat_s,
            peer_timeout_s=max(10.0, 5 * config.buffer.heartbeat_s),
            max_message_bytes=1 << 30,
            keys=buffer_keys(config),
        )
        try:
            self.state = RunState(config, resume=resume)
        except BaseException:
            self.server.close()
            raise
        self.ledger = self.state.ledger
        self.outbox: list[tuple[str, m.Message]] = []
        self.acks: list[tuple[str, int, str | None]] = []
        self.asking: dict[int, set[str]] = defaultdict(set)
        self.beats: dict[str, Heartbeat] = {}
        self.hellos: dict[str, Hello] = {}
        self.heard: dict[str, float] = {}
        self.gone: dict[str, dict[str, str | float]] = {}
        self.came: dict[str, float] = {}
        self.weights: Announce | None = None
        self.stopping = False
        self._welcome()
        write_address(config.run_dir, self.server.address)

    # --- the loop ------------------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Turns until the run is over; 0 when it is complete, 143 when it was told to stop."""
        say(f"buffer: {self.config.name} listens on {self.server.address}")
        while not self.stopping and not self.state.finished:
            self.turn(TURN_S)
        reason = "stopped" if self.stopping else "complete"
        self._goodbye(reason)
        say(f"buffer: {reason} at step {self.ledger.committed} of {self.config.steps}")
        return 143 if self.stopping else 0

    def turn(self, timeout_s: float) -> None:
        """One round: events in, decisions out, commit, and only then answers."""
        now = time.monotonic()
        for event in self.server.poll(0.0 if self.outbox else timeout_s):
            match event:
                case Joined(worker, hello):
                    self._joined(worker, hello)
                case Left(worker, reason):
                    self._left(worker, reason)
                case Received(worker, id, message):
                    self._received(worker, id, message, now)
        self.state.admit()
        for decision in self.ledger.decide(now):
            match decision:
                case Issue():
                    self.outbox.append((decision.worker, self.state.ticket(decision)))
                case Score():
                    self.outbox.append((decision.worker, self.state.grade_task(decision)))
                case Decided():
                    self.state.decided(decision)
        self._answer_plans()
        self.state.commit()
        for worker, id, refused in self.acks:
            self.server.ack(worker, id, refused)
        self.acks.clear()
        outbox, self.outbox = self.outbox, []
        for worker, message in outbox:
            self.server.send(worker, message)

    def stop(self) -> None:
        """Ends the loop after this turn; everything acknowledged is in the log."""
        self.stopping = True

    def close(self) -> None:
        self.server.close()
        self.state.close()

    # --- events --------------------------------------------------------------------------------------------------

    def _joined(self, worker: str, hello: Hello) -> None:
        self.hellos[worker], self.heard[worker] = hello, time.monotonic()
        self.gone.pop(worker, None)
        self.ledger.joined(worker, hello.role, hello.capacity)
        if hello.role != "observer":
            self.state.event("joined", worker, f"{hello.role} pid {hello.pid} on {hello.host}")

    def _left(self, worker: str, reason: str) -> None:
        hello = self.hellos.pop(worker, None)
        self.beats.pop(worker, None)
        self.heard.pop(worker, None)
        self.ledger.left(worker)
        for asking in self.asking.values():
            asking.discard(worker)
        if hello and hello.role != "observer":
            self.state.event("left", worker, reason)
            self.gone[worker] = {"name": worker, "role": hello.role, "reason": reason, "at": time.time()}
            self.gone = dict(list(self.gone.items())[-GONE:])

    def _received(self, worker: str, id: int, message: m.Message, now: float) -> None:
        refused: str | None = None
        self.heard[worker] = now
        match message:
            case Heartbeat():
                self.beats[worker] = message
                self.ledger.alive(worker, ((h.group, h.fence) for h in message.held), now, version=message.version)
                return
            case StatusRequest():
                self.outbox.append((worker, self.status()))
                return
            case m.Rollout():
                refused = self.state.rollout(worker, message)
                self.came["response"] = now
            case m.HandBack():
                refused = self.state.hand_back(worker, message)
            case m.Grade():
                refused = self.state.grade(worker, message)
                self.came["grade"] = now
            case m.PlanRequest():
                refused = self._plan_request(worker, message.step)
            case m.Pull():
                refused = self._pull(worker, message)
            case m.StepCommit():
                refused = self.state.step(message)
                self._welcome()  # a learner that starts anew takes no checkpoint beyond the log's last step
            case Announce():
                self.weights = message
                self._welcome()
                self.outbox += [(name, message) for name, hello in self.hellos.items() if hello.role == "generator"]
            case _:
                refused = f"a {type(message).__name__} is not for the buffer"
        if refused is not None:
            self.state.event("refused", worker, refused)
        self.acks.append((worker, id, refused))

    def _plan_request(self, worker: str, step: int) -> str | None:
        if not 1 <= step <= self.config.steps:
            return f"plan: got step {step}, expected 1 to {self.config.steps}"
        self.asking[step].add(worker)
        return None

    def _pull(self, worker: str, pull: m.Pull) -> str | None:
        found = self.state.batch(pull)
        if isinstance(found, str):
            return found
        self.outbox.append((worker, found))
        return None

    def _answer_plans(self) -> None:
        for step in [step for step, workers in self.asking.items() if workers]:
            plan = self.state.plan(step)
            if plan is not None:
                self.outbox += [(worker, plan) for worker in self.asking.pop(step)]

    def status(self) -> Status:
        """What the view and `headrace status` show."""
        now = time.monotonic()
        workers = []
        for name, hello in self.hellos.items():
            beat = self.beats.get(name)
            said = msgspec.to_builtins(beat) if beat is not None else {"state": "joined", "since": 0.0}
            if hello.role != "observer":
                workers.append({"name": name, "role": hello.role, **said, "silent_s": now - self.heard.get(name, now)})
        return Status(
            run=self.config.name,
            step=self.ledger.committed,
            steps=self.config.steps,
            done=self.state.finished,
            ledger={
                **self.ledger.figures(),
                **self.ledger.standing(),
                **{f"last_{what}_s": now - at for what, at in self.came.items()},
                "heartbeat_s": self.config.buffer.heartbeat_s,
            },
            workers=workers,
            metrics=self.state.latest,
            evals=self.state.evaluations.figures,
            gone=list(self.gone.values()),
        )

    def _welcome(self) -> None:
        self.server.welcome = Welcome(
            run=self.config.name,
            heartbeat_s=self.config.buffer.heartbeat_s,
            step=self.ledger.committed,
            weights=self.weights,
        )

    def _goodbye(self, reason: str) -> None:
        """Tells every worker, and waits a bounded time until they have left."""
        for worker in self.hellos:
            self.server.send(worker, Goodbye(reason))
        deadline = time.monotonic() + GOODBYE_S
        while any(h.role != "observer" for h in self.hellos.values()) and time.monotonic() < deadline:
            self.turn(0.1)


def write_address(run_dir: Path, address: str) -> None:
    """Publishes the bound address for workers on this machine; whole or not at all."""
    temporary = run_dir / "address.tmp"
    temporary.write_text(address + "\n", encoding="utf-8")
    temporary.replace(run_dir / "address")
