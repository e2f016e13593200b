"""`headrace status --why` names what holds a run up: eight faults of real buffers, links and launches, each by its name."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from audited_run import config_of

from engine.config import Config
from engine.models import create_model
from protocols import messages as m
from protocols.link import Client
from workers.buffer import Buffer
from workers.view import ask_status
from workers.why import Cause, cause, standstill

ROOT = Path(__file__).parent.parent
LEARNER = """
import sys, time
from protocols.link import Client
from protocols.messages import Hello, PlanRequest
client = Client(sys.argv[1], Hello(role="learner", name="learner-0", host="here", pid=1), timeout_s=60.0)
client.status("waits for the groups of step 1", owes="buffer")
client.send(PlanRequest(1))
time.sleep(120)
"""


class Worker:
    """A real link client in a thread, which answers what it is sent as long as it is not closed."""

    def __init__(self, address: str, role: m.Role, name: str, answer: Callable[[Client, m.Message], None]) -> None:
        hello = m.Hello(role=role, name=name, host="here", pid=1, capacity=16)
        self.client = Client(address, hello, timeout_s=30.0)
        self._answer, self._over = answer, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            if (message := self.client.receive(0.05)) is not None:
                self._answer(self.client, message)

    def close(self) -> None:
        self._over.set()
        self._thread.join(10.0)
        self.client.close()


def generate(client: Client, message: m.Message) -> None:
    if isinstance(message, m.Ticket):
        for sample in message.samples:
            tokens, logprobs = np.array([1, 2], m.INT), np.full(2, -0.5, m.FLOAT)
            client.send(
                m.Rollout(message.group, sample, message.fence, tokens, logprobs, [(0, 2)], "stop", "1", 1.0, 2.0)
            )


def grade(client: Client, message: m.Message, *, wrong: Callable[[int], bool] = lambda sample: sample % 2 == 1) -> None:
    if isinstance(message, m.GradeTask):
        right = not wrong(message.sample)
        client.send(
            m.Grade(message.group, message.sample, message.attempt, "graded", correct=right, reward=float(right))
        )


def grade_all_right(client: Client, message: m.Message) -> None:
    grade(client, message, wrong=lambda sample: False)


def ignore(client: Client, message: m.Message) -> None:
    return


class Run:
    """A real buffer and the workers that a test lets join it."""

    def __init__(self, config: Config, parts: ExitStack) -> None:
        self.run_dir = config.run_dir
        self._parts, self._made = parts, threading.Event()
        self._thread = threading.Thread(target=self._serve, args=[config], daemon=True)
        self._thread.start()
        assert self._made.wait(60.0), "the buffer did not start"
        self.address = self.buffer.server.address

    def _serve(self, config: Config) -> None:
        with closing(Buffer(config)) as self.buffer:
            self._made.set()
            self.buffer.serve()

    def join(
        self, role: m.Role, answer: Callable[[Client, m.Message], None] = ignore, state: str = "", owes: str = ""
    ) -> Worker:
        worker = self._parts.enter_context(closing(Worker(self.address, role, f"{role}-0", answer)))
        if state:
            served = 0 if role == "generator" and owes != "learner" else None
            worker.client.status(state, owes=owes, version=served)
        return worker

    def learner(self, state: str = "waits for the groups of step 1", owes: str = "buffer") -> Worker:
        worker = self.join("learner", state=state, owes=owes)
        worker.client.send(m.PlanRequest(1))
        return worker

    def why(self, kind: str, timeout_s: float = 45.0) -> Cause:
        """The cause that is named, once it is of this kind."""
        deadline = time.monotonic() + timeout_s
        while (found := cause(ask_status(self.run_dir), time.time())).kind != kind:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def stop(self) -> None:
        self._parts.close()
        self.buffer.stop()
        self._thread.join(30.0)


@contextmanager
def serving(folder: Path, **buffer: object) -> Iterator[Run]:
    base = config_of(folder, steps=3)
    settings = msgspec.structs.replace(base.buffer, heartbeat_s=0.2, **buffer)
    config = msgspec.structs.replace(base, buffer=settings, eval=msgspec.structs.replace(base.eval, prompts=0))
    create_model(config.model, config.run_dir / "model", 0)  # type: ignore[arg-type]
    run = Run(config, ExitStack())
    try:
        yield run
    finally:
        run.stop()


def test_a_generator_that_is_gone(tmp_path: Path) -> None:
    with serving(tmp_path) as run:
        run.learner()
        run.join("reward", grade)
        generator = run.join("generator", ignore, "decodes")
        assert "responses are being made" in run.why("generator").text
        generator.client.send(m.Goodbye("killed"))
        deadline = time.monotonic() + 30.0
        while "no generator is there" not in (found := run.why("generator")).text and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "step 1 waits for responses: no generator is there; generator-0 left 0:0" in found.text
        assert found.owes == "generator"


def test_a_reward_that_is_stuck(tmp_path: Path) -> None:
    with serving(tmp_path) as run:
        run.learner()
        run.join("generator", generate, "waits for tickets", "buffer")
        run.join("reward", ignore, "scores")
        found = run.why("reward")
        assert found.owes == "reward-0"
        assert "responses of step 1 wait for a grade: reward-0 scores (since 0:" in found.text


def test_weights_that_no_generator_gets(tmp_path: Path) -> None:
    with serving(tmp_path) as run:
        run.learner()
        run.join("reward", grade)
        run.join("generator", ignore, "waits for the learner at 10.0.0.9:4711", "learner")
        found = run.why("weights")
        assert found.owes == "learner"
        assert "generator-0 waits for the learner at 10.0.0.9:4711" in found.text


def test_a_peer_that_is_missing_in_the_weight_group(tmp_path: Path) -> None:
    with serving(tmp_path) as run:
        run.learner("waits for generator-0 to take version 4 (at most 60 s)", "generator")
        found = run.why("weights")
        assert found.owes == "generator"
        assert "learner-0 waits for generator-0 to take version 4" in found.text


def test_groups_of_which_none_is_informative(tmp_path: Path) -> None:
    with serving(tmp_path) as run:
        run.learner()
        run.join("generator", generate, "decodes")
        run.join("reward", grade_all_right)
        found = run.why("uninformative")
        assert found.text.startswith("step 1 has 0 groups: the last ")
        assert "were all right or all wrong" in found.text


def test_a_lag_budget_of_none(tmp_path: Path) -> None:
    with serving(tmp_path, max_lag=0) as run:
        learner = run.learner()
        run.join("generator", generate, "waits for tickets", "buffer")
        run.join("reward", grade)
        assert trains(learner, run)
        found = run.why("lag")
        assert found.owes == "learner-0"
        assert "max_lag = 0 lets nothing more into the system" in found.text


def trains(learner: Worker, run: Run) -> bool:
    """The learner has its plan and trains."""
    deadline = time.monotonic() + 30.0
    while not run.buffer.ledger.planned and time.monotonic() < deadline:
        time.sleep(0.05)
    learner.client.status("trains step 1")
    return bool(run.buffer.ledger.planned)


def test_a_learner_that_is_stopped(tmp_path: Path) -> None:
    with serving(tmp_path) as run:
        run.join("generator", generate, "waits for tickets", "buffer")
        run.join("reward", grade)
        process = subprocess.Popen([sys.executable, "-c", LEARNER, run.address], cwd=ROOT)
        try:
            deadline = time.monotonic() + 30.0
            while not any(w["role"] == "learner" for w in ask_status(run.run_dir).workers):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(signal.SIGSTOP)
            deadline = time.monotonic() + 30.0
            while "is silent for" not in (found := run.why("learner")).text and time.monotonic() < deadline:
                time.sleep(0.1)
            assert found.owes == "learner-0"
            assert "step 1 waits for a learner: learner-0 is silent for 0:0" in found.text
        finally:
            process.kill()
            process.wait()


@pytest.mark.timeout(300)
def test_data_that_are_exhausted_end_the_launch_and_its_diary_says_so(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "trial.toml").write_text(
        f"""
name = "trial"
steps = 3
runs = "{tmp_path}"
model = {{ type = "new", alphabet = "0123456789= ", hidden = 16, layers = 1, heads = 2, kv_heads = 1, intermediate = 32, context = 32 }}
objective = {{ type = "sft" }}
buffer = {{ groups_per_step = 2, prompt_tokens = 1, long_prompts = "skip" }}
learner = {{ lr = 1e-3, token_budget = 64 }}
[[tasks]]
type = "jsonl"
path = "{tmp_path}/rows.jsonl"
chat = false
solution = "{{answer}}"
score = {{ type = "exact" }}
held_out = 0
"""
    )
    cli = [sys.executable, "-m", "workers.cli"]
    done = subprocess.run(
        [*cli, "launch", "--no-view", str(tmp_path / "trial.toml")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    told = subprocess.run([*cli, "status", str(config.run_dir), "--why"], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "no buffer answers; the launch ended at 20" in told.stdout
    assert "prompts in a row were skipped, so none is left to train on" in told.stdout
    assert standstill(config.run_dir).kind == "ended"
