"""Documents as rows of a task: what is asked, what is held out, and how a response is graded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from reportlab.pdfgen.canvas import Canvas
from utel_receipts import COMPANIES, receipt, write_receipts

from engine.config import DocumentScore, DocumentsTask
from engine.documents.grading import Reference, grade_document, reference
from engine.documents.page import Page, write_pages
from engine.documents.split import company_key
from engine.fields import TaskError
from engine.rewards import RewardError, score
from engine.tasks import Source

LABELS = {"company": "ACORN SUPPLY SDN BHD", "date": "10/03/2018", "total": "20.50"}
PAGE = Reference(
    id="a", wanted=["company", "date", "total"], labels=LABELS, missed=0, words=["x"], boxes=[(0, 0, 1, 1)]
)


def task_of(path: Path, **settings: Any) -> DocumentsTask:
    return DocumentsTask(path=str(path), **{"held_out": 0, "chat": False, **settings})


def rows_of(path: Path, **settings: Any) -> list[Any]:
    source = Source([task_of(path, **settings)], seed=1)
    return [source[index] for index in range(len(source._rows[0]))]


def test_a_receipt_becomes_a_prompt_an_answer_and_a_solution(tmp_path: Path) -> None:
    write_receipts(tmp_path / "r.jsonl", 1)
    [row] = rows_of(tmp_path / "r.jsonl", fields=["date", "total"])
    assert "fields from the document below: date, total." in row.prompt
    assert "@100 ACORN SUPPLY SDN BHD\n" in row.prompt
    assert json.loads(row.solution) == {"date": "10/03/2018", "total": "20.50"}
    page = reference(json.loads(row.answer))
    assert (page.id, page.wanted, page.missed, page.words[:2]) == ("R0", ["date", "total"], 0, ["ACORN", "SUPPLY"])
    result = score(task_of(tmp_path / "r.jsonl"), f"Here it is: {row.solution}", row.answer)
    assert (result.correct, result.reward) == (True, 1.0)


def test_the_prompts_limits(tmp_path: Path) -> None:
    write_receipts(tmp_path / "r.jsonl", 1)
    [row] = rows_of(tmp_path / "r.jsonl", question="{fields}?\n", positions=False, first_words=7, fields=["date"])
    assert row.prompt == "date?\nACORN SUPPLY SDN BHD\n1 JALAN MAWAR,"
    [row] = rows_of(tmp_path / "r.jsonl", question="{fields}?\n", positions=False, max_characters=60)
    assert len(row.prompt) <= 60
    assert "rows left out]" in row.prompt
    [row] = rows_of(
        tmp_path / "r.jsonl", question="Look:\n{page}\n{fields}: ", positions=False, first_words=4, fields=["date"]
    )
    assert row.prompt == "Look:\nACORN SUPPLY SDN BHD\ndate: "
    with pytest.raises(TaskError, match="page R0: max_characters: got 9, expected at least"):
        rows_of(tmp_path / "r.jsonl", max_characters=9)


def test_whole_companies_are_held_out(tmp_path: Path) -> None:
    write_receipts(tmp_path / "r.jsonl", 40)
    source = Source([task_of(tmp_path / "r.jsonl", held_out=10)], seed=3)
    held = {company_key(reference(json.loads(row.answer)).labels["company"]) for row in source.pool}  # type: ignore[index]
    assert len(source.pool) == 10
    assert len(held) == 1
    drawn = {company_key(reference(json.loads(source[index].answer)).labels["company"]) for index in range(60)}  # type: ignore[index]
    assert drawn == {company_key(name) for name in COMPANIES} - held
    assert [row.prompt_id for row in Source([task_of(tmp_path / "r.jsonl", held_out=10)], seed=9).pool] == [
        row.prompt_id for row in source.pool
    ]


def test_labels_that_stand_nowhere_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {**receipt(0), "fields": {**receipt(0)["fields"], "total": "99.99"}}
    (tmp_path / "r.jsonl").write_text(json.dumps(bad) + "\n")
    with caplog.at_level(logging.WARNING):
        [row] = rows_of(tmp_path / "r.jsonl")
    assert "1 labels stand nowhere on their page" in caplog.text
    assert score(task_of(tmp_path / "r.jsonl"), "{}", row.answer).parts["labels_missed"] == 1.0


def test_pages_without_labels_need_a_tagger(tmp_path: Path) -> None:
    bare = {name: value for name, value in receipt(0).items() if name != "fields"}
    (tmp_path / "r.jsonl").write_text(json.dumps(bare) + "\n")
    with pytest.raises(TaskError, match=r"page R0: has no labels for company, .* and score\.utel names no tagger"):
        rows_of(tmp_path / "r.jsonl")
    utel = DocumentScore(utel="somewhere")
    [row] = rows_of(tmp_path / "r.jsonl", score=utel)
    assert reference(json.loads(row.answer)).labels is None
    assert row.solution is None
    with pytest.raises(RewardError, match="only a scorer that has loaded the tagger can score this task"):
        score(task_of(tmp_path / "r.jsonl", score=utel), "{}", row.answer)


def test_forms_pages_and_pdfs(tmp_path: Path) -> None:
    page = Page(id="p", words=["Total", "5"], boxes=[(0, 0, 9, 9), (20, 0, 29, 9)], fields={"Total": "5"})
    write_pages(tmp_path / "pages.jsonl.gz", [page])
    [row] = rows_of(tmp_path / "pages.jsonl.gz", fields=[])
    assert json.loads(row.solution) == {"Total": "5"}
    folder = tmp_path / "pdfs"
    folder.mkdir()
    for name in ("one", "two"):
        canvas = Canvas(str(folder / f"{name}.pdf"))
        for number in range(3):
            canvas.drawString(100, 700, f"{name} {number}")
            canvas.showPage()
        canvas.save()
    source = Source([task_of(folder, score=DocumentScore(utel="somewhere"), held_out=3)], seed=1)
    assert len({reference(json.loads(row.answer)).id.split("-")[0] for row in source.pool}) == 1
    assert len(source.pool) == 3
    with pytest.raises(TaskError, match=r"fields: got none with score\.utel"):
        rows_of(folder, score=DocumentScore(utel="somewhere"), fields=[])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="got no page with words"):
        rows_of(tmp_path / "empty.jsonl")


def test_both_references_are_in_the_parts() -> None:
    reading = {"company": "ACORN SUPPLY SDN BHD", "date": "10/03/2018", "total": "8.00"}
    answer = json.dumps(
        {"company": "Acorn Supply Sdn. Bhd.", "date": "10 March 2018", "total": "RM 8.00", "extra": "x"}
    )
    got = grade_document(answer, PAGE, reading)
    assert got.parts == {
        "parsed": 1.0, "labelled": 1.0, "labels_missed": 0.0, "label_f1": pytest.approx(2 / 3), "utel_f1": 1.0,
        "reading_f1": pytest.approx(2 / 3),
    }  # fmt: skip
    assert (got.correct, got.reward) == (False, pytest.approx(2 / 3))
    assert grade_document(answer, PAGE, reading, threshold=0.6).correct
    unlabelled = msgspec.structs.replace(PAGE, labels=None)
    got = grade_document(answer, unlabelled, reading)
    assert got.parts == {"parsed": 1.0, "labelled": 0.0, "utel_f1": 1.0}
    assert (got.correct, got.reward) == (True, 1.0)
    with pytest.raises(RewardError, match="has no labels, and"):
        grade_document(answer, unlabelled, None)


@pytest.mark.parametrize("text", ["", "no idea", '{"total": ', "[1, 2]", '{"total": "20.50"', "{'total': '20.50'}"])
def test_what_is_no_json_object_is_graded_0(text: str) -> None:
    got = grade_document(text, PAGE, {})
    assert (got.correct, got.reward, got.parts["parsed"]) == (False, 0.0, 0.0)
    nothing_there = msgspec.structs.replace(PAGE, labels=None)
    assert grade_document(text, nothing_there, {}).reward == 0.0
    assert grade_document("{}", nothing_there, {}).reward == 1.0


def test_a_row_without_its_page_cannot_be_scored() -> None:
    with pytest.raises(RewardError, match="document: expected the page and its labels"):
        score(task_of(Path("r.jsonl")), "{}", json.dumps({"answer": "x"}))
