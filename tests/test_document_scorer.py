"""The scorer that has loaded UTel: batches, one reading a page, the right verdict, and what goes wrong around it."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from utel_receipts import learn_tagger, write_receipts

from engine.config import DocumentScore, DocumentsTask, ExactScore, JsonlTask, PythonScore, RewardConfig, Task
from engine.documents.grading import reference
from engine.tasks import Source
from protocols.messages import Grade, GradeTask
from workers.score_documents import Readings
from workers.scorer import ScorerError
from workers.scorer_pool import Inbox, ScorerPool

CONFIG = RewardConfig(scorers=1, timeout_s=60.0, memory_mb=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    write_receipts(folder / "r.jsonl")
    learn_tagger(folder / "tagger", folder / "r.jsonl")
    return folder


def documents(folder: Path, **settings: Any) -> DocumentsTask:
    score = DocumentScore(utel=str(folder / "tagger"))
    return DocumentsTask(path=str(folder / "r.jsonl"), **{"chat": False, "held_out": 0, "score": score, **settings})


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[str]:
    source = Source([documents(folder)], seed=0)
    return [source[index].answer for index in range(4)]


def asked(task: str, text: str, answer: str, sample: int = 0) -> GradeTask:
    return GradeTask(
        group=1, sample=sample, attempt=0, task=task, prompt_text="", text=text, answer=answer, response_tokens=9,
        finish="stop",
    )  # fmt: skip


class Desk:
    def __init__(self, tasks: dict[str, Task]) -> None:
        self.grades: queue.SimpleQueue[Grade] = queue.SimpleQueue()
        self.pool = ScorerPool(tasks, CONFIG, self.grades.put)
        self.pool.start()

    def take(self, count: int) -> list[Grade]:
        return sorted((self.grades.get(timeout=120) for _ in range(count)), key=lambda grade: grade.sample)


@pytest.fixture(scope="module")
def desk(folder: Path) -> Iterator[Desk]:
    python = PythonScore("scoring_functions:segfaults")
    desk = Desk({
        "receipts": documents(folder),
        "exact": JsonlTask(path="none", extract="whole", score=ExactScore()),
        "dies": JsonlTask(path="none", score=python),
    })  # fmt: skip
    yield desk
    desk.pool.close(1.0)


def test_many_responses_each_with_both_references(desk: Desk, answers: list[str]) -> None:
    for sample in range(24):
        answer = answers[sample % 4]
        text = ["{}", "no JSON", json.loads(answer)["answer"]][sample % 3]
        desk.pool.submit(asked("receipts", text, answer, sample))
    for grade in desk.take(24):
        assert grade.verdict == "graded", grade
        assert grade.parts["reading_f1"] == 1.0  # the tagger knows these by heart
        assert grade.parts["label_f1"] == grade.parts["utel_f1"] == grade.reward == float(grade.sample % 3 == 2)
        assert grade.parts["parsed"] == float(grade.sample % 3 != 1)


def test_other_tasks_and_failures_beside_it(desk: Desk, answers: list[str]) -> None:
    broken = json.dumps({"answer": "x", "document": {"id": "x"}})
    right = json.loads(answers[0])["answer"]
    desk.pool.submit(asked("receipts", right, answers[0], 0))
    desk.pool.submit(asked("receipts", right, broken, 1))
    desk.pool.submit(asked("exact", "x", json.dumps({"answer": "x", "row": {}}), 2))
    desk.pool.submit(asked("dies", "x", json.dumps({"answer": "x", "row": {}}), 3))
    desk.pool.submit(asked("receipts", right, answers[0], 4))
    grades = desk.take(5)
    assert [grade.verdict for grade in grades] == ["graded", "crash", "graded", "crash", "graded"]
    assert [grade.reward for grade in grades] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert "document: expected the page and its labels" in grades[1].detail
    assert "SIGSEGV" in grades[3].detail


def test_a_page_is_read_once(folder: Path, answers: list[str]) -> None:
    readings = Readings(DocumentScore(utel=str(folder / "tagger")), ["company", "total"])
    references = [reference(json.loads(answers[number % 4])) for number in range(12)]
    first = readings.of(references)
    assert (readings.pages_read, len(first)) == (4, 12)
    assert (
        first[:4]
        == first[4:8]
        == [{name: one.labels[name] for name in ("company", "total")} for one in references[:4] if one.labels]
    )
    assert readings.of(references[::-1]) == first[::-1]
    assert (readings.pages_read, readings.of([])) == (4, [])


def test_the_inbox_batches_one_task_and_keeps_the_order() -> None:
    inbox = Inbox(frozenset({"batched"}))
    for sample, name in enumerate(["single", "batched", "single", "batched", "batched"]):
        inbox.put(asked(name, "", "", sample))
    assert [[task.sample for task in inbox.take()] for _ in range(3)] == [[0], [1, 3, 4], [2]]
    inbox.put(asked("single", "", ""))
    assert inbox.close() == 1
    assert inbox.take() == []


@pytest.mark.parametrize(
    ("fields", "utel", "message"),
    [
        (["company", "tax"], "tagger", "expected the task's fields tax too"),
        (["company"], "none", "no config.json there"),
    ],
)
def test_a_tagger_that_cannot_serve_is_one_clear_error(
    folder: Path, fields: list[str], utel: str, message: str
) -> None:
    task = documents(folder, fields=fields, score=DocumentScore(utel=str(folder / utel)))
    with pytest.raises(ScorerError, match=message) as caught:
        Desk({"receipts": task})
    assert caught.value.refused
