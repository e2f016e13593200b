"""Folders of documents through the whole pipeline: what is read, turned and left out is counted and shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_documents_funsd import FORM
from test_utel_commands import draw_receipt

from protocols.log import Log

pytest.importorskip("reportlab", reason="needs the extra `documents`: pip install -e '.[documents]'")
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfgen.canvas import Canvas

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
name = "read"
steps = 2
model = {{ type = "utel", hidden = 64, layers = 1, heads = 2, intermediate = 96, vocabulary = 120 }}
tasks = [{{ type = "pages", path = "{pages}", held_out = 1 }}]
objective = {{ type = "utel", length = 64 }}
buffer = {{ groups_per_step = 2, samples_per_group = 1, prompt_tokens = 50000 }}
learner = {{ lr = 1e-3, device = "cpu" }}
eval = {{ prompts = 1, every = 2 }}
runs = "{runs}"
"""


def launch(pages: Path, folder: Path, code: int = 0) -> str:
    """Two steps on what `pages` holds; what was said."""
    path = folder / "config.toml"
    path.write_text(CONFIG.format(pages=pages, runs=folder), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "workers.cli", "launch", str(path), "--no-view"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "400"}, timeout=250,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def reading(folder: Path, said: str) -> str:
    """What the run says of its data: in its log, in the closing table and in report.json alike."""
    [found] = json.loads((folder / "read" / "report.json").read_text(encoding="utf-8"))["readings"]
    with Log.open(folder / "read" / "rollouts.db") as log:
        assert [event.detail for event in log.events() if event.kind == "read"] == [found]
        assert log.last_step() == 2
    counted = found.split(": ", 1)[1].split("; ")[0]
    assert counted in " ".join(part for line in said.splitlines() for part in line.strip("│┃ ").split()), said
    return str(found)


def draw(path: Path) -> None:
    """Words at the edge of the page and beyond, then an empty page."""
    canvas = Canvas(str(path), pagesize=(400, 300))
    canvas.drawString(370, 200, "overhanging")
    canvas.drawString(900, 200, "outside")
    canvas.drawString(50, 200, "inside and more")
    canvas.showPage()
    canvas.showPage()
    canvas.save()


def test_a_folder_of_pdfs(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(3):  # three pages each: a receipt, a scan, a page without anything to read
        draw_receipt(pages / f"receipt-{number}.pdf", number, turned=number == 2)
    draw_receipt(pages / "locked.pdf", 0, encrypt=StandardEncryption("user", ownerPassword="owner"))
    (pages / "broken.pdf").write_bytes(b"no PDF")
    draw(pages / "edges.pdf")
    found = reading(tmp_path, launch(pages, tmp_path))
    for count in (
        "files 6", "refused 2", "pages 11", "kept 4", "rotated pages 1", "pages without text 3", "empty pages 4",
        "clipped boxes 1", "words outside 1",
    ):  # fmt: skip
        assert f"{count}," in f"{found.splitlines()[0].replace(';', ',')},", found
    assert "3 pages hold no text that can be read: run OCR on them first" in found
    assert "locked.pdf: is encrypted, and opens with a password only" in found
    assert "broken.pdf: not a PDF that can be read" in found


def test_a_folder_of_forms(tmp_path: Path) -> None:
    pages = tmp_path / "funsd"
    for name in ("annotations", "images"):
        (pages / name).mkdir(parents=True)
    for number in range(4):
        words = [{"text": text, "box": [10, 60, 30, 70]} for text in ("more", str(number))]
        more = {"id": 9, "label": "other", "text": f"more {number}", "box": [10, 60, 30, 70], "words": words}
        form = [] if number == 3 else [*FORM, more]
        (pages / "annotations" / f"{number}.json").write_text(json.dumps({"form": form}), encoding="utf-8")
        Image.new("L", (200, 100)).save(pages / "images" / f"{number}.png")
    found = reading(tmp_path, launch(pages, tmp_path))
    for text in ("pages 4, words 33", "blank words 6", "clipped boxes 3", "links 6", "links left out 6", "entities 18"):
        assert text in found
    assert "1 pages without words were left out" in found


def test_a_folder_without_a_word_is_refused_with_what_was_found(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    draw_receipt(pages / "locked.pdf", 0, encrypt=StandardEncryption("user", ownerPassword="owner"))
    said = launch(pages, tmp_path, code=2)
    assert "got no page with words, expected at least one; files 1, refused 1" in said
    assert "is encrypted" in said
