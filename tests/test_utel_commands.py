"""`headrace utel-tag` and `headrace utel-extract` as a user meets them: real processes, one clear line for bad input."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas
from utel_receipts import learn_tagger, receipt, write_receipts

from engine.config import ConfigError
from engine.fields import TaskError
from engine.utel.model import Utel
from engine.utel.tagging import UtelTagger, make_labels, save_tagger
from tests.utel_pages import STILL, make_pieces
from workers.utel_extract import extract
from workers.utel_tag import tag

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    write_receipts(folder / "receipts.jsonl")
    learn_tagger(folder / "tagger", folder / "receipts.jsonl")
    return folder / "tagger"


def headrace(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "workers.cli", *map(str, arguments)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def draw_receipt(path: Path, number: int, *, turned: bool = False, encrypt: StandardEncryption | None = None) -> Path:
    """The receipt on the first page, a scan on the second, nothing on the third."""
    page = receipt(number)
    size = (page["height"], page["width"]) if turned else (page["width"], page["height"])
    canvas = Canvas(str(path), pagesize=size, encrypt=encrypt)
    canvas.setFont("Courier", 15)
    if turned:
        canvas.translate(page["height"], 0)
        canvas.rotate(90)
    for line in page["lines"]:
        canvas.drawString(line["box"][0], page["height"] - line["box"][3], line["text"])
    canvas.showPage()
    canvas.drawImage(ImageReader(Image.new("L", (20, 20))), 0, 0, 400, 300)
    canvas.showPage()
    canvas.rect(10, 10, 50, 50)
    canvas.showPage()
    canvas.save()
    return path


def coloured(path: Path) -> int:
    """Pixels that are neither black, white nor grey."""
    with Image.open(path) as image:
        red, green, blue = (
            torch.frombuffer(bytearray(band.tobytes()), dtype=torch.uint8).int()
            for band in image.convert("RGB").split()
        )
    return int(((red - green).abs() + (green - blue).abs() > 60).sum())


def test_a_page_is_tagged_and_drawn(model: Path, tmp_path: Path) -> None:
    path = draw_receipt(tmp_path / "one.pdf", 1)
    done = headrace("utel-tag", model, path)
    assert done.returncode == 0, done.stderr
    for text in ("BIRCH & SONS", "11/03/2018", "2 JALAN MAWAR, 81201 JOHOR", "21.50", "picture: "):
        assert text in done.stdout, done.stdout
    assert coloured(tmp_path / "one-p001.png") > 1000


def test_a_page_drawn_sideways_is_turned(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = draw_receipt(tmp_path / "turned.pdf", 2, turned=True)
    tag(model, path, 1, tmp_path / "turned.png", "cpu")
    out = capsys.readouterr().out
    assert "CEDAR TRADING" in out
    assert "rotated pages 1" in out
    with Image.open(tmp_path / "turned.png") as image:
        assert image.height > image.width


def test_pdfs_that_cannot_be_tagged_are_one_clear_line(model: Path, tmp_path: Path) -> None:
    path = draw_receipt(tmp_path / "one.pdf", 0)
    locked = draw_receipt(tmp_path / "locked.pdf", 0, encrypt=StandardEncryption("user", ownerPassword="owner"))
    (tmp_path / "no.pdf").write_bytes(b"no PDF")
    cases = [
        (path, 2, "one.pdf: page 2: has no text layer that can be read, as a scan has none; run OCR on it first"),
        (path, 3, "one.pdf: page 3: has no words, expected at least one"),
        (path, 4, "one.pdf: page: got 4, expected 1 to 3"),
        (locked, 1, "locked.pdf: is encrypted, and opens with a password only; expected a copy without one"),
        (tmp_path / "no.pdf", 1, "no.pdf: not a PDF that can be read"),
        (tmp_path / "none.pdf", 1, "none.pdf: cannot be read: No such file"),
    ]
    for file, number, message in cases:
        with pytest.raises(TaskError, match=re.escape(message)):
            tag(model, file, number, None, "cpu")
    done = headrace("utel-tag", model, locked)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert "is encrypted" in done.stderr
    assert not list(tmp_path.glob("*.png"))


def test_receipts_are_read_whatever_their_labels_say(model: Path, tmp_path: Path) -> None:
    rows = write_receipts(tmp_path / "labelled.jsonl")
    wanted = [{"id": row["id"], "fields": row["fields"]} for row in rows]
    bare = [{**row, "fields": fields} for row, fields in zip(rows, (None, {}, {"total": "1.00"}, "x"), strict=True)]
    del bare[1]["fields"]
    long = {**rows[0], "id": "long", "lines": rows[0]["lines"] * 60}
    empty = {**rows[0], "id": "empty", "lines": []}
    with gzip.open(tmp_path / "bare.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in [*bare, long, empty])
    done = headrace("utel-extract", model, tmp_path / "bare.jsonl.gz", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert got[:4] == wanted
    assert got[4]["id"] == "long"
    assert got[5] == {"id": "empty", "fields": {}}
    assert "6 pages" in done.stdout
    for name in ("company", "date", "address", "total"):
        assert f"{name} on {sum(name in row['fields'] for row in got)}" in done.stdout


def test_a_bad_row_is_named_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    rows = write_receipts(tmp_path / "rows.jsonl", 2)
    out = tmp_path / "out.jsonl"
    out.write_text("as it was\n")
    for bad, message in [
        ("{", "rows.jsonl:3: not JSON"),
        (json.dumps({**rows[0], "width": 0}), "rows.jsonl:3: got a page of 0 x 600 pixels"),
        (json.dumps({**rows[0], "lines": [{"text": "no box"}]}), "rows.jsonl:3: not a receipt"),
        (json.dumps({**rows[0], "id": ""}), "rows.jsonl:3: id: got an empty text"),
    ]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + bad + "\n")
        with pytest.raises(TaskError, match=re.escape(message)):
            extract(model, tmp_path / "rows.jsonl", out, "cpu")
    done = headrace("utel-extract", model, tmp_path / "rows.jsonl", out)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert "rows.jsonl:3: id: got an empty text" in done.stderr
    assert out.read_text() == "as it was\n"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}


def test_a_tagger_of_other_entities_is_refused(tmp_path: Path) -> None:
    write_receipts(tmp_path / "rows.jsonl", 1)
    save_tagger(tmp_path / "forms", UtelTagger(Utel(STILL), make_labels(["question", "total"])), make_pieces())
    with pytest.raises(
        ConfigError, match="forms: this tagger knows question, total, expected company, date, address too"
    ):
        extract(tmp_path / "forms", tmp_path / "rows.jsonl", tmp_path / "out.jsonl", "cpu")


def test_a_folder_of_pdfs_is_extracted_and_what_was_left_out_is_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pdfs"
    folder.mkdir()
    draw_receipt(folder / "one.pdf", 1)
    draw_receipt(folder / "turned.pdf", 2, turned=True)
    draw_receipt(folder / "locked.pdf", 0, encrypt=StandardEncryption("user", ownerPassword="owner"))
    extract(model, folder, tmp_path / "out.jsonl", "cpu")
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["fields"]["date"]) for row in got] == [
        ("one-p001", "11/03/2018"), ("turned-p001", "12/03/2018")
    ]  # fmt: skip
    said = capsys.readouterr().out
    for text in (
        "files 3, refused 1, pages 6, kept 2",
        "rotated pages 1, pages without text 2",
        "is encrypted",
        "2 pages; found company on 2",
    ):
        assert text in said
