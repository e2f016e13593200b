"""Forms in FUNSD's format: one written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from engine.documents.funsd import FunsdReport, read_funsd_folder
from engine.documents.page import TaskError

FORM = [
    {"id": 0, "label": "header", "text": "Order form", "box": [10, 5, 90, 15], "linking": [[0, 1]],
     "words": [{"text": "Order", "box": [10, 5, 45, 15]}, {"text": "form", "box": [50, 5, 90, 15]}]},
    {"id": 1, "label": "question", "text": "Ship to:", "box": [10, 20, 60, 30], "linking": [[0, 1], [1, 2], [1, 3]],
     "words": [{"text": "Ship", "box": [10, 20, 35, 30]}, {"text": "to:", "box": [40, 20, 60, 30]}]},
    {"id": 2, "label": "answer", "text": "Ann Lee", "box": [70, 20, 120, 30], "linking": [[1, 2]],
     "words": [{"text": "Ann", "box": [70, 20, 90, 30]}, {"text": " ", "box": [91, 20, 94, 30]},
               {"text": "Lee", "box": [95, 20, 120, 30]}]},
    {"id": 3, "label": "answer", "text": "Oslo", "box": [70, 35, 120, 45], "linking": [[3, 1]],
     "words": [{"text": "Oslo", "box": [70, 35, 210, 45]}]},
    {"id": 7, "label": "other", "text": "p. 1", "box": [150, 90, 170, 99], "linking": [],
     "words": [{"text": "p.", "box": [150, 90, 158, 99]}, {"text": "1", "box": [160, 90, 170, 99]}]},
    {"id": 8, "label": "answer", "text": "", "box": [150, 50, 170, 60], "linking": [[1, 8]],
     "words": [{"text": "", "box": [150, 50, 170, 60]}]},
]  # fmt: skip


def folder(path: Path, form: object) -> Path:
    (path / "annotations").mkdir(exist_ok=True)
    (path / "images").mkdir(exist_ok=True)
    (path / "annotations" / "0001.json").write_text(json.dumps({"form": form}))
    Image.new("L", (200, 100)).save(path / "images" / "0001.png")
    return path


def test_a_form(tmp_path: Path) -> None:
    report = FunsdReport()
    [page] = read_funsd_folder(folder(tmp_path, FORM), report)
    assert page.words == ["Order", "form", "Ship", "to:", "Ann", "Lee", "Oslo", "p.", "1"]
    assert page.tags == [
        "B-header", "I-header", "B-question", "I-question", "B-answer", "I-answer", "B-answer", "O", "O"
    ]  # fmt: skip
    assert page.boxes[0] == (50, 50, 225, 150), "of the word, not of the segment"
    assert page.boxes[6] == (350, 350, 1000, 450)
    assert page.links == [(2, 4), (2, 6)], "key to value, each once, however the file turns its pairs"
    assert page.fields == {"Ship to": "Ann Lee Oslo"}
    assert (page.id, page.family) == ("0001", "funsd")
    assert report == FunsdReport(
        pages=1, words=9, blank_words=2, clipped_boxes=1, links=2, links_left_out=2,
        entities={"header": 1, "question": 1, "answer": 2, "other": 1},
    )  # fmt: skip


def test_broken_forms_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no annotations/\*\.json, expected FUNSD's layout"):
        list(read_funsd_folder(tmp_path, FunsdReport()))
    with pytest.raises(TaskError, match=r"0001\.json: form\[0\]\.label: got 'title', expected one of header"):
        list(read_funsd_folder(folder(tmp_path, [FORM[0] | {"label": "title"}]), FunsdReport()))
    with pytest.raises(TaskError, match=r"0001\.json: not a FUNSD form: .*`box`"):
        list(read_funsd_folder(folder(tmp_path, [FORM[0] | {"words": [{"text": "a"}]}]), FunsdReport()))
    folder(tmp_path, FORM)
    (tmp_path / "images" / "0001.png").unlink()
    with pytest.raises(TaskError, match=r"0001\.png: not an image that can be read"):
        list(read_funsd_folder(tmp_path, FunsdReport()))
