"""The reward role as a process of its own, with the link's real server in the buffer's place."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_scorer_pool import tagged, wait_until

from engine.config import parse_config
from protocols.link import Joined, Left, Received, Server
from protocols.link_messages import Goodbye, Heartbeat
from protocols.messages import Grade, GradeTask, Message

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from engine.config import parse_config
from workers.reward import run
sys.exit(run(parse_config(json.loads(Path(sys.argv[1]).read_text()), "test"), sys.argv[2], "reward-0", gone_s=5.6))
"""


def config(*functions: str, **reward: float) -> dict[str, object]:
    tasks = [
        {
            "type": "jsonl",
            "path": f"{function}.jsonl",
            "score": {"type": "python", "function": f"scoring_functions:{function}"},
        }
        for function in functions
    ]
    return {
        "name": "test",
        "steps": 1,
        "model": {"type": "path", "path": "none"},
        "tasks": tasks,
        "objective": {"type": "dapo"},
        "buffer": {"groups_per_step": 1},
        "learner": {"lr": 1e-6},
        "reward": {"scorers": 2, "tasks_per_scorer": 4, "timeout_s": 2.0, **reward},
    }


class Buffer:
    """What the buffer does with a reward worker: acknowledge each grade, note everything else."""

    def __init__(self, address: str = "tcp://127.0.0.1:0") -> None:
        self.server = Server(address, heartbeat_s=0.2, peer_timeout_s=5.0)
        self.joined: list[Joined] = []
        self.left: list[Left] = []
        self.grades: list[Grade] = []
        self.beats: list[Heartbeat] = []
        self.acknowledges = True

    def until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline:
            for event in self.server.poll(0.02):
                match event:
                    case Joined():
                        self.joined.append(event)
                    case Left():
                        self.left.append(event)
                    case Received(worker, id, Grade() as grade):
                        self.grades.append(grade)
                        if self.acknowledges:
                            self.server.ack(worker, id)
                    case Received(_, _, Heartbeat() as beat):
                        self.beats.append(beat)
        assert condition(), (self.joined, self.left, self.grades, self.beats[-1:])

    def submit(self, function: str, text: str = "x", *, sample: int = 0) -> None:
        self.send(
            GradeTask(
                group=7, sample=sample, attempt=1, task=function, prompt_text="", text=text,
                answer=json.dumps({"answer": "x", "row": {}}), response_tokens=3, finish="stop",
            )
        )  # fmt: skip

    def send(self, message: Message) -> None:
        assert self.server.send("reward-0", message)


class Worker:
    """The role's process, for `with`: killed at the end if it is still there."""

    def __init__(self, folder: Path, address: str, data: dict[str, object]) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(data))
        code = CODE.format(tests=str(ROOT / "tests"))
        command = [sys.executable, "-c", code, str(path), address]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        wait_until(lambda: not tagged(self.process.pid))

    def ended(self, timeout_s: float = 20.0) -> tuple[int, str]:
        """Exit code and standard error; nothing that it started is left."""
        _, errors = self.process.communicate(timeout=timeout_s)
        assert not tagged(self.process.pid)
        return self.process.returncode, errors


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    buffer = Buffer()
    yield buffer
    buffer.server.close()


def test_the_config_of_these_tests_is_one() -> None:
    parse_config(config("equal"), "test")


def test_every_task_gets_its_grade_and_the_run_ends_with_goodbye(buffer: Buffer, tmp_path: Path) -> None:
    with Worker(tmp_path, buffer.server.address, config("equal", "hangs_in_c", "segfaults")) as worker:
        buffer.until(lambda: buffer.joined)
        hello = buffer.joined[0].hello
        assert (hello.role, hello.name, hello.capacity, hello.pid) == ("reward", "reward-0", 8, worker.process.pid)
        for sample in range(8):
            buffer.submit("equal", "x" if sample % 2 else "y", sample=sample)
        buffer.until(lambda: len(buffer.grades) == 8)
        assert {(g.sample, g.correct, g.reward) for g in buffer.grades} == {
            (s, bool(s % 2), 1.0 if s % 2 else -1.0) for s in range(8)
        }
        assert {(g.group, g.attempt, g.verdict) for g in buffer.grades} == {(7, 1, "graded")}
        for sample, function in enumerate(["hangs_in_c", "segfaults", "equal", "no_such_task"], 8):
            buffer.submit(function, sample=sample)
        buffer.until(lambda: len(buffer.grades) == 12)
        verdicts = {g.sample: g.verdict for g in buffer.grades[8:]}
        assert verdicts == {8: "timeout", 9: "crash", 10: "graded", 11: "infra"}
        buffer.until(lambda: buffer.beats[-1].counters.get("graded") == 9)
        buffer.until(lambda: buffer.beats[-1].state == "waits for responses to score")
        buffer.send(Goodbye("complete"))
        buffer.until(lambda: buffer.left)
        code, errors = worker.ended()
        assert code == 0, errors
        assert "goodbye: complete" in errors


def test_sigterm_lets_running_jobs_end_and_flushes(buffer: Buffer, tmp_path: Path) -> None:
    with Worker(tmp_path, buffer.server.address, config("slow", timeout_s=60.0)) as worker:
        buffer.until(lambda: buffer.joined)
        for sample, seconds in enumerate(["1.5", "60", "0", "0"]):
            buffer.submit("slow", seconds, sample=sample)
        buffer.until(lambda: buffer.beats and buffer.beats[-1].counters.get("busy") == 2)
        worker.process.send_signal(signal.SIGTERM)
        buffer.until(lambda: buffer.left)
        assert [g.sample for g in buffer.grades] == [0]
        assert buffer.left[0].reason == "stopped, 3 responses not scored"
        code, errors = worker.ended()
        assert code == 0, errors


def test_a_buffer_that_is_gone_is_one_clear_error(buffer: Buffer, tmp_path: Path) -> None:
    gone = Buffer()
    with Worker(tmp_path, gone.server.address, config("equal")) as worker:
        gone.until(lambda: gone.beats)  # it has its welcome; who waits for one waits longer
        gone.server.close()
        code, errors = worker.ended()
        assert code == 1
        lines = errors.strip().splitlines()
        assert len(lines) == 1, errors
        assert "reward-0: waited 6 s for a sign of life from the buffer at tcp://127.0.0.1:" in lines[0]


def test_a_buffer_that_is_started_anew_gets_the_grades_that_it_did_not_acknowledge(tmp_path: Path) -> None:
    first = Buffer()
    first.acknowledges = False
    address = first.server.address
    with Worker(tmp_path, address, config("equal")) as worker:
        first.until(lambda: first.joined)
        first.submit("equal", sample=0)
        first.until(lambda: first.grades)
        first.server.close()
        second = Buffer(address)
        try:
            second.until(lambda: second.joined and second.grades)
            assert [g.sample for g in second.grades] == [0]
            second.submit("equal", sample=1)
            second.until(lambda: len(second.grades) == 2)
            second.send(Goodbye("stopped"))
            second.until(lambda: second.left)
            code, errors = worker.ended()
            assert code == 0, errors
        finally:
            second.server.close()


def test_tasks_that_cannot_be_scored_end_the_worker_before_it_joins(buffer: Buffer, tmp_path: Path) -> None:
    with Worker(tmp_path, buffer.server.address, config("no_such_function")) as worker:
        code, errors = worker.ended()
        assert code == 2
        assert errors.count("\n") == 1
        assert "scoring_functions:no_such_function" in errors
    buffer.until(lambda: True)
    assert not buffer.joined
