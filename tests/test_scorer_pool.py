"""The scorer pool against functions that hang, crash, eat memory and fork: the right verdict, and nothing left behind."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import scoring_functions

from engine.config import ExactScore, JsonlTask, Overlong, PythonScore, ReasoningGymTask, RewardConfig, Task
from protocols.messages import Grade, GradeTask
from workers.scorer import TAG, ScorerError
from workers.scorer_pool import ScorerPool

TIMEOUT_S = 1.5
FUNCTIONS = [
    name
    for name, value in vars(scoring_functions).items()
    if callable(value) and getattr(value, "__module__", "") == "scoring_functions"
]


def task_of(function: str) -> Task:
    return JsonlTask(path="none", score=PythonScore(f"scoring_functions:{function}"))


class Desk:
    """A pool with an inbox for its grades."""

    def __init__(self, config: RewardConfig, tasks: dict[str, Task]) -> None:
        self.grades: queue.SimpleQueue[Grade] = queue.SimpleQueue()
        self.pool = ScorerPool(tasks, config, self.grades.put)
        self.pool.start()

    def submit(self, task: str, text: str = "x", *, sample: int = 0) -> None:
        answer = json.dumps({"answer": "x", "row": {}})
        self.pool.submit(
            GradeTask(
                group=1, sample=sample, attempt=0, task=task, prompt_text="", text=text, answer=answer,
                response_tokens=10, finish="stop",
            )
        )  # fmt: skip

    def grade(self, task: str, text: str = "x") -> Grade:
        self.submit(task, text)
        return self.grades.get(timeout=30)


def tagged(owner: int | None = None) -> set[int]:
    """Processes that carry the mark of a scorer of `owner` (this process) and live."""
    mark = f"{TAG}={owner or os.getpid()}-".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and any(
                e.startswith(mark) for e in (entry / "environ").read_bytes().split(b"\0")
            ):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    before = children()
    config = RewardConfig(scorers=1, timeout_s=TIMEOUT_S, memory_mb=512)
    desk = Desk(config, {name: task_of(name) for name in FUNCTIONS})
    yield desk
    assert desk.pool.close(5.0) == 0
    assert tagged() == set()
    assert children() <= before  # no zombie of ours either


def test_right_wrong_and_the_parts(desk: Desk) -> None:
    right, wrong = desk.grade("equal", "x"), desk.grade("equal", "y")
    assert (right.verdict, right.correct, right.reward, right.parts) == ("graded", True, 1.0, {"outcome": 1.0})
    assert (wrong.verdict, wrong.correct, wrong.reward, wrong.parts) == ("graded", False, -1.0, {"outcome": -1.0})
    own = desk.grade("own_reward", "abc")
    assert (own.correct, own.reward, own.parts) == (False, 0.25, {"style": 3.0, "outcome": 0.25})


@pytest.mark.parametrize(
    ("function", "verdict", "detail"),
    [
        ("prints", "graded", ""),
        ("child_returns", "graded", ""),
        ("leaves_a_child", "graded", ""),
        ("hangs_in_c", "timeout", "reward.timeout_s = 1.5"),
        ("ignores_signals", "timeout", "reward.timeout_s"),
        ("fork_bomb", "timeout", "reward.timeout_s"),
        ("segfaults", "crash", "SIGSEGV"),
        ("exits", "crash", "SystemExit: enough (scoring_functions.py:"),
        ("exits_at_once", "crash", "exited with code 0"),
        ("raises", "crash", "RuntimeError: no ? such luck (scoring_functions.py:"),
        ("recurses", "crash", "RecursionError"),
        ("returns_nonsense", "crash", "returned a str, expected bool, float or a dict"),
        ("eats_memory", "crash", "reward.memory_mb = 512"),
        ("child_holds_pipe", "crash", "exited with code 3"),
        ("writes_to_every_pipe", "crash", "the answer's stream"),
    ],
)
def test_verdict_and_the_next_job_is_graded(desk: Desk, function: str, verdict: str, detail: str) -> None:
    grade = desk.grade(function)
    assert grade.verdict == verdict, grade
    assert detail in grade.detail
    assert grade.seconds < TIMEOUT_S + 1
    if verdict != "graded":
        assert (grade.correct, grade.reward, grade.parts) == (False, 0.0, {})
    wait_until(lambda: len(tagged()) <= 1 + (function == "leaves_a_child"))
    following = desk.grade("equal")
    assert following.verdict == "graded", following


def test_a_scorer_is_reused_and_one_that_writes_unasked_is_replaced(desk: Desk) -> None:
    first = desk.grade("pid").reward
    assert desk.grade("pid").reward == first
    desk.grade("answers_late")
    time.sleep(0.5)
    later = desk.grade("pid")
    assert later.verdict == "graded"
    assert later.reward != first


def test_garbage_that_a_data_set_raises_on_is_graded_wrong_and_a_broken_row_is_a_crash() -> None:
    task = ReasoningGymTask(dataset="prime_factorization", size=3, extract="whole")
    desk = Desk(RewardConfig(scorers=1, timeout_s=30.0), {"primes": task})
    try:
        grades = []
        for answer in ("2 × 3", "six"):
            desk.pool.submit(
                GradeTask(
                    group=1, sample=0, attempt=0, task="primes", prompt_text="", text="seven",
                    answer=json.dumps({"question": "?", "answer": answer, "metadata": {}}),
                    response_tokens=10, finish="stop",
                )
            )  # fmt: skip
            grades.append(desk.grades.get(timeout=30))
    finally:
        desk.pool.close(0.0)
    assert [grade.verdict for grade in grades] == ["graded", "crash"]
    assert (grades[0].correct, grades[0].reward, grades[0].parts["unreadable"]) == (False, -1.0, 1.0)
    assert "ValueError" in grades[0].detail
    assert "ValueError" in grades[1].detail


def test_an_unknown_task_is_infra(desk: Desk) -> None:
    grade = desk.grade("no_such_task")
    assert grade.verdict == "infra"
    assert "no_such_task" in grade.detail


def test_large_texts_pass(desk: Desk) -> None:
    assert desk.grade("equal", "é" * 3_000_000).verdict == "graded"


def test_scorers_work_at_the_same_time_and_close_ends_what_runs() -> None:
    before = tagged()
    desk = Desk(RewardConfig(scorers=3, timeout_s=60), {"slow": task_of("slow"), "fork_bomb": task_of("fork_bomb")})
    started = time.monotonic()
    for sample in range(3):
        desk.submit("slow", "0.6", sample=sample)
    assert {desk.grades.get(timeout=20).sample for _ in range(3)} == {0, 1, 2}
    assert time.monotonic() - started < 1.5
    for sample, text in enumerate(["0.5", "300", "300"]):
        desk.submit("slow" if sample < 2 else "fork_bomb", text, sample=sample)
    for sample in range(3, 6):
        desk.submit("slow", "0", sample=sample)
    wait_until(lambda: desk.pool.busy == 3)
    assert desk.pool.queued == 3
    assert desk.pool.close(1.0) == 5
    assert desk.grades.get_nowait().sample == 0  # ended within the second
    assert desk.grades.empty()
    assert tagged() <= before
    assert desk.pool.counters["graded"] == 4


def test_overlong_penalty_comes_on_top() -> None:
    config = RewardConfig(overlong=Overlong(max_length=12, cache=4))
    desk = Desk(config, {"exact": JsonlTask(path="none", extract="whole", score=ExactScore())})
    grade = desk.grade("exact")
    desk.pool.close(1.0)
    assert (grade.correct, grade.reward) == (True, 0.5)
    assert grade.parts == {"extracted": 1.0, "value": 1.0, "outcome": 1.0, "overlong": -0.5}


@pytest.mark.parametrize(
    ("task", "memory_mb", "message"),
    [
        (task_of("no_such_function"), 1024, "no_such_function"),
        (ReasoningGymTask(dataset="no_such_set"), 1024, "no_such_set"),
        (ReasoningGymTask(dataset="chain_sum"), 60, "reward.memory_mb = 60"),
    ],
)
def test_a_scorer_that_cannot_start_is_one_clear_error(task: Task, memory_mb: int, message: str) -> None:
    before = tagged()
    with pytest.raises(ScorerError, match=message):
        Desk(RewardConfig(scorers=2, memory_mb=memory_mb), {"task": task})
    assert tagged() <= before


def test_a_scorer_that_cannot_start_again_is_infra_until_it_can(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    (tmp_path / "fragile_scoring.py").write_text(
        f"import os, sys\nif os.path.exists({str(broken)!r}): sys.exit('the disk is gone')\n"
        "def f(text, answer_row):\n    return os._exit(1) if text == 'die' else True\n"
    )
    sys.path.append(str(tmp_path))
    try:
        desk = Desk(RewardConfig(timeout_s=5), {"f": JsonlTask(path="none", score=PythonScore("fragile_scoring:f"))})
        broken.touch()
        assert desk.grade("f", "die").verdict == "crash"
        grade = desk.grade("f")
        assert grade.verdict == "infra"
        assert "the disk is gone" in grade.detail
        broken.unlink()
        assert desk.grade("f").verdict == "graded"
        desk.pool.close(1.0)
    finally:
        sys.path.remove(str(tmp_path))


OWNER = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_scorer_pool import Desk, task_of
from engine.config import RewardConfig
desk = Desk(RewardConfig(scorers=2, timeout_s=300), {{"slow": task_of("slow"), "hangs_in_c": task_of("hangs_in_c")}})
desk.submit("hangs_in_c")
while not desk.pool.busy:
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(300)
"""


def test_scorers_end_when_their_owner_is_killed() -> None:
    code = OWNER.format(tests=str(Path(__file__).parent))
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    assert len(tagged(owner.pid)) == 2
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    owner.stdout.close()
    wait_until(lambda: not tagged(owner.pid))
