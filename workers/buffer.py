"""The buffer: one process that moves bytes between the link, the ledger and the log.

The ledger decides, the log remembers, this file carries out. In each turn the events of the link go to the ledger,
what follows from them goes to the log, the log commits, and only then acknowledgements, tickets and answers leave:
whatever a worker was told is on disk. No torch here.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import msgspec

from engine.config import Config, ConfigError, dump_config
from protocols import messages as m
from protocols.ledger import Decided, Issue, Ledger, Pace, Score
from protocols.link import Joined, Left, Received, Server
from protocols.log import GroupRow, Log
from workers.intake import Intake
from workers.metrics import MetricsWriter
from workers.provenance import code_version

TURN_S = 0.02
"""A turn waits this long for events when nothing arrives; leases and plans are looked at that often."""
GOODBYE_S = 10.0
"""How long the buffer waits, at the end, for its workers to leave."""
FENCES_PER_START = 1 << 20
"""Each process that serves a run gives out fences of its own range, so a zombie of an earlier one is refused."""
SAY_FRUITLESS = 10
"""After this many steps' worth of groups without an informative one, say so; the run goes on."""


def run(config: Config, *, resume: bool = False, address: str | None = None) -> int:
    """Serves one run until its last step is committed and evaluated. Exit code 0 then, 143 after SIGTERM."""
    buffer = Buffer(config, resume=resume, address=address)
    signal.signal(signal.SIGTERM, lambda *_: buffer.stop())
    try:
        return buffer.serve()
    finally:
        buffer.close()


class Buffer:
    """See the module's docstring. `serve()` is the loop; every other method handles one kind of event or decision."""

    def __init__(self, config: Config, *, resume: bool = False, address: str | None = None) -> None:
        self.config = config
        self.intake = Intake(config)
        self.rows: dict[int, GroupRow] = {}
        self.texts: dict[tuple[int, int], m.Rollout] = {}
        self.partials: dict[tuple[int, int], m.Partial] = {}
        self.outbox: list[tuple[str, m.Message]] = []
        self.acks: list[tuple[str, int, str | None]] = []
        self.asking: dict[int, set[str]] = defaultdict(set)
        self.evaluating: dict[int, set[int]] = {}
        self.beats: dict[str, m.Heartbeat] = {}
        self.hellos: dict[str, m.Hello] = {}
        self.weights: m.Announce | None = None
        self.latest: dict[str, float] = {}
        self.evals: list[dict[str, float]] = []
        self.next_group = 0
        self.said_fruitless = 0
        self.stopping = False
        self.log = self._open_log(resume)
        starts = sum(event.kind == "started" for event in self.log.events())
        self.log.add_event("started", "buffer", code_version(), time.time())
        self.log.commit()
        self.ledger = Ledger(pace_of(config), first_fence=starts * FENCES_PER_START)
        self.metrics = MetricsWriter(config.run_dir)
        self._restore()
        self.server = Server(
            address or config.buffer.address,
            heartbeat_s=config.buffer.heartbeat_s,
            peer_timeout_s=max(10.0, 5 * config.buffer.heartbeat_s),
            max_message_bytes=1 << 30,
        )
        self._welcome()
        write_address(config.run_dir, self.server.address)

    # --- the loop ------------------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Turns until the run is over; 0 when it is complete, 143 when it was told to stop."""
        say(f"buffer: {self.config.name} listens on {self.server.address}")
        while not self.stopping and not self.finished():
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
        self._begin_evaluations()
        self._admit()
        for decision in self.ledger.decide(now):
            match decision:
                case Issue():
                    self._issue(decision)
                case Score():
                    self._score(decision)
                case Decided():
                    self._decided(decision)
        self._answer_plans()
        self.log.commit()
        self._end_evaluations()
        for worker, id, refused in self.acks:
            self.server.ack(worker, id, refused)
        self.acks.clear()
        outbox, self.outbox = self.outbox, []
        for worker, message in outbox:
            self.server.send(worker, message)

    def finished(self) -> bool:
        """The last step is committed and every evaluation that is due has been made."""
        return self.ledger.committed >= self.config.steps and not self.evaluating and not self._due()

    def stop(self) -> None:
        """Ends the loop after this turn; everything acknowledged is in the log."""
        self.stopping = True

    def close(self) -> None:
        self.server.close()
        self.metrics.close()
        self.log.close()

    # --- events --------------------------------------------------------------------------------------------------

    def _joined(self, worker: str, hello: m.Hello) -> None:
        self.hellos[worker] = hello
        self.ledger.joined(worker, hello.role, hello.capacity)
        if hello.role != "observer":
            self.log.add_event("joined", worker, f"{hello.role} pid {hello.pid} on {hello.host}", time.time())

    def _left(self, worker: str, reason: str) -> None:
        hello = self.hellos.pop(worker, None)
        self.beats.pop(worker, None)
        self.ledger.left(worker)
        for asking in self.asking.values():
            asking.discard(worker)
        if hello and hello.role != "observer":
            self.log.add_event("left", worker, reason, time.time())

    def _received(self, worker: str, id: int, message: m.Message, now: float) -> None:
        refused: str | None = None
        match message:
            case m.Heartbeat():
                self.beats[worker] = message
                self.ledger.alive(worker, ((h.group, h.fence) for h in message.held), now)
                return
            case m.StatusRequest():
                self.outbox.append((worker, self.status()))
                return
            case m.Rollout():
                refused = self._rollout(worker, message)
            case m.HandBack():
                refused = self.ledger.hand_back(worker, message.group, message.fence, message.samples)
                if refused is None:
                    self.partials.update({(message.group, p.sample): p for p in message.partials})
            case m.Grade():
                refused = self._grade(worker, message)
            case m.PlanRequest():
                refused = self._plan_request(worker, message.step)
            case m.Pull():
                refused = self._pull(worker, message)
            case m.StepCommit():
                refused = self._commit(message)
            case m.Announce():
                self.weights = message
                self._welcome()
                self.outbox += [(name, message) for name, hello in self.hellos.items() if hello.role == "generator"]
            case _:
                refused = f"a {type(message).__name__} is not for the buffer"
        if refused is not None:
            self.log.add_event("refused", worker, refused, time.time())
        self.acks.append((worker, id, refused))

    def _rollout(self, worker: str, rollout: m.Rollout) -> str | None:
        refused = self.ledger.rollout(worker, rollout.group, rollout.sample, rollout.fence, rollout.tokens.shape[0])
        if refused is None:
            self.log.add_rollout(worker, rollout, time.time())
            self.texts[rollout.group, rollout.sample] = rollout
            self.partials.pop((rollout.group, rollout.sample), None)
        return refused

    def _grade(self, worker: str, grade: m.Grade) -> str | None:
        refused = self.ledger.grade(worker, grade.group, grade.sample, grade.attempt, grade.verdict, grade.correct)
        if refused is None:
            self.log.add_grade(worker, grade, time.time())
        return refused

    def _plan_request(self, worker: str, step: int) -> str | None:
        if not 1 <= step <= self.config.steps:
            return f"plan: got step {step}, expected 1 to {self.config.steps}"
        self.asking[step].add(worker)
        return None

    def _pull(self, worker: str, pull: m.Pull) -> str | None:
        planned = set(self.ledger.planned.get(pull.step) or self.log.plan(pull.step) or ())
        if strangers := [group for group in pull.groups if group not in planned]:
            return f"pull: groups {strangers[:5]} are not in the plan of step {pull.step}"
        self.outbox.append((worker, self.log.batch(pull.step, pull.groups)))
        return None

    def _commit(self, commit: m.StepCommit) -> str | None:
        if commit.step <= self.ledger.committed:
            known = self.log.step(commit.step)
            if known is not None and known.weights_hash != commit.weights_hash:
                detail = f"step {commit.step}: re-trained to {commit.weights_hash}, the log has {known.weights_hash}"
                self.log.add_event("diverged", "learner", detail, time.time())
                return detail
            return None
        try:
            groups = self.ledger.commit(commit.step)
        except ValueError as error:
            return str(error)
        self.latest = {**self.ledger.figures(), **commit.metrics}
        self.log.commit_step(msgspec.structs.replace(commit, metrics=self.latest))
        for group in groups:
            self.log.set_group(group, "trained", step=commit.step)
        self.log.commit()
        self.metrics.step(commit.step, self.latest)
        self._welcome()  # a learner that starts anew takes no checkpoint beyond the log's last step
        return None

    # --- decisions -----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Draws prompts while the pacing rule has room and somebody could start on them."""
        room = self.ledger.room()
        appetite = self.ledger.appetite() if self.intake.kind == "train" else room
        while room > 0 and appetite > 0:
            min_version = max(0, self.ledger.committed - self.config.buffer.max_lag)
            row, rollout = self.intake.train(self.next_group, min_version=min_version)
            self._enter(row)
            if rollout is not None:
                grade = m.Grade(row.group, 0, 0, "graded", correct=True, reward=1.0)
                self.log.add_rollout("source", rollout, row.issued_at)
                self.log.add_grade("source", grade, row.issued_at)
            room, appetite = room - 1, appetite - row.samples
        for problem in self.intake.skipped:
            self.log.add_event("skipped", "source", problem, time.time())
        self.intake.skipped.clear()

    def _enter(self, row: GroupRow) -> None:
        self.next_group = row.group + 1
        self.rows[row.group] = row
        self.log.add_group(row)
        self.ledger.add_group(row.group, row.kind, row.samples, min_version=row.min_version)

    def _issue(self, issue: Issue) -> None:
        row, generator = self.rows[issue.group], self.config.generator
        if generator is None:
            raise ConfigError(f"{self.config.source}: a generator joined, but the config has no [generator]")
        sampling = generator.sampling
        if row.kind == "eval":
            evaluation = self.config.eval
            sampling = msgspec.structs.replace(
                sampling, temperature=evaluation.temperature, top_p=evaluation.top_p, top_k=0
            )
        ticket = m.Ticket(
            group=issue.group,
            samples=issue.samples,
            fence=issue.fence,
            prompt=row.prompt,
            sampling=sampling,
            seed=row.seed,
            min_version=issue.min_version,
            resume=[self.partials[issue.group, s] for s in issue.samples if (issue.group, s) in self.partials],
        )
        self.outbox.append((issue.worker, ticket))

    def _score(self, score: Score) -> None:
        row, rollout = self.rows[score.group], self.texts[score.group, score.sample]
        task = m.GradeTask(
            group=score.group,
            sample=score.sample,
            attempt=score.attempt,
            task=row.task,
            prompt_text=row.prompt_text,
            text=rollout.text,
            answer=row.answer,
            response_tokens=rollout.tokens.shape[0],
            finish=rollout.finish,
        )
        self.outbox.append((score.worker, task))

    def _decided(self, decided: Decided) -> None:
        row = self.rows.pop(decided.group)
        for sample in range(row.samples):
            self.texts.pop((decided.group, sample), None)
        if decided.outcome == "evaluated":
            self.log.set_group(decided.group, "evaluated")
            self.evaluating[row.min_version].discard(decided.group)
        elif decided.outcome != "ready":
            self.log.set_group(decided.group, decided.outcome, reason=decided.reason)
        rounds = self.ledger.fruitless // self.config.buffer.groups_per_step
        if rounds >= SAY_FRUITLESS + self.said_fruitless:
            self.said_fruitless = rounds
            say(f"buffer: {self.ledger.fruitless} groups in a row were all right or all wrong; sampling goes on")
        elif rounds == 0:
            self.said_fruitless = 0

    def _answer_plans(self) -> None:
        for step in [step for step, workers in self.asking.items() if workers]:
            plan = self._plan(step)
            if plan is not None:
                self.outbox += [(worker, plan) for worker in self.asking.pop(step)]

    def _plan(self, step: int) -> m.Plan | None:
        known = self.log.step(step) if step <= self.ledger.committed else None
        if known is not None:
            groups: list[int] | None = self.log.plan(step)
        else:
            new = step not in self.ledger.planned
            groups = self.ledger.plan(step) if step == self.ledger.committed + 1 else None
            if groups is not None and new:
                self.log.add_plan(step, groups)
                for group in groups:
                    self.rows.pop(group, None)
        if groups is None:
            return None
        return m.Plan(
            step=step,
            groups=self.log.sizes(groups),
            weights_hash=known.weights_hash if known else None,
            last=step == self.config.steps,
            metrics=self.ledger.figures(),
        )

    # --- evaluation: held-out prompts as groups of their own kind, which no pacing counts and nothing waits for ------

    def _due(self) -> list[int]:
        """Steps whose weights are to be evaluated now and are not yet."""
        evaluation, committed = self.config.eval, self.ledger.committed
        if not self.intake.held_out:
            return []
        steps = {0, self.config.steps} | (
            set(range(0, self.config.steps, evaluation.every)) if evaluation.every else set()
        )
        done = {int(e["eval_step"]) for e in self.evals}
        # A resumed run may have passed several; only the newest of those still measures the weights it names.
        passed = [s for s in sorted(steps) if s <= committed and s not in done]
        return [s for s in passed[-1:] if s not in self.evaluating]

    def _begin_evaluations(self) -> None:
        for step in self._due():
            rows = list(self.intake.evaluation(self.next_group, step=step))
            self.evaluating[step] = {row.group for row in rows}
            for row in rows:
                self._enter(row)

    def _end_evaluations(self) -> None:
        for step in [step for step, groups in self.evaluating.items() if not groups]:
            del self.evaluating[step]
            figures = self.log.evaluation(step)
            if figures is not None:
                self.evals.append({"eval_step": step, **figures})
                self.metrics.evaluation(step, figures)

    # --- the run's state -----------------------------------------------------------------------------------------

    def status(self) -> m.Status:
        """What the view and `headrace status` show."""
        workers = [
            {"name": name, "role": hello.role, **msgspec.to_builtins(self.beats[name])}
            if name in self.beats
            else {"name": name, "role": hello.role, "state": "joined", "since": 0.0}
            for name, hello in self.hellos.items()
            if hello.role != "observer"
        ]
        return m.Status(
            run=self.config.name,
            step=self.ledger.committed,
            steps=self.config.steps,
            done=self.finished(),
            ledger=self.ledger.figures(),
            workers=workers,
            metrics=self.latest,
            evals=self.evals,
        )

    def _open_log(self, resume: bool) -> Log:
        path = self.config.run_dir / "rollouts.db"
        if resume and path.exists():
            return Log.open(path, write=True)
        if path.exists():
            raise ConfigError(f"{path}: exists already; continue it with --resume or choose another name")
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        return Log.create(path, run=self.config.name, config=dump_config(self.config), code_version=code_version())

    def _restore(self) -> None:
        """Rebuilds the ledger from the log: the same groups, with the results that were committed."""
        self.next_group, self.intake.cursor = self.log.next_group(), self.log.next_source_index(self.intake.kind)
        self.ledger.committed = self.log.last_step()
        self.evals = self.log.evaluations()
        for step, groups in self.log.planned():
            self.ledger.restore_plan(step, groups)
        for state in self.log.unfinished():
            row = state.row
            self.rows[row.group] = row
            self.ledger.add_group(row.group, row.kind, row.samples, min_version=row.min_version)
            if row.kind == "eval":
                self.evaluating.setdefault(row.min_version, set()).add(row.group)
            if row.kind == "ready":
                continue  # it entered with its response and grade
            self.texts.update({(row.group, rollout.sample): rollout for rollout in self.log.rollouts(row.group)})
            for sample in state.samples:
                self.ledger.restore_rollout(row.group, sample.sample, sample.response_tokens)
                for attempt, verdict, correct in sample.attempts:
                    self.ledger.restore_grade(row.group, sample.sample, attempt, verdict, correct)

    def _welcome(self) -> None:
        self.server.welcome = m.Welcome(
            run=self.config.name,
            heartbeat_s=self.config.buffer.heartbeat_s,
            step=self.ledger.committed,
            weights=self.weights,
        )

    def _goodbye(self, reason: str) -> None:
        """Tells every worker, and waits a bounded time until they have left."""
        for worker in self.hellos:
            self.server.send(worker, m.Goodbye(reason))
        deadline = time.monotonic() + GOODBYE_S
        while any(h.role != "observer" for h in self.hellos.values()) and time.monotonic() < deadline:
            self.turn(0.1)


def pace_of(config: Config) -> Pace:
    """The ledger's settings of a run."""
    return Pace(
        steps=config.steps,
        groups_per_step=config.buffer.groups_per_step,
        max_lag=config.buffer.max_lag,
        dynamic_sampling=config.buffer.dynamic_sampling,
        max_oversample=config.buffer.max_oversample,
        lease_s=config.buffer.lease_s,
        # A worker is within its lease even if every task that it holds runs into the time limit.
        grade_lease_s=config.reward.tasks_per_scorer * config.reward.timeout_s + 30,
        grade_attempts=config.reward.attempts,
    )


def write_address(run_dir: Path, address: str) -> None:
    """Publishes the bound address for workers on this machine; whole or not at all."""
    temporary = run_dir / "address.tmp"
    temporary.write_text(address + "\n", encoding="utf-8")
    temporary.replace(run_dir / "address")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
