"""PDFs: words and boxes as a reader sees them, whatever the file does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from engine.documents.page import Page, TaskError
from engine.documents.pdf import PdfReport, read_pdf, read_pdf_folder

WIDTH, HEIGHT = 400.0, 300.0


def draw(path: Path, *pages: Callable[[Canvas], object], size: tuple[float, float] = (WIDTH, HEIGHT)) -> Path:
    canvas = Canvas(str(path), pagesize=size)
    for page in pages:
        canvas.setFont("Helvetica", 10)
        page(canvas)
        canvas.showPage()
    canvas.save()
    return path


def read(path: Path, report: PdfReport | None = None) -> list[Page]:
    return list(read_pdf(path, PdfReport() if report is None else report))


def near(box: tuple[int, ...], expected: tuple[float, ...], slack: float = 12) -> bool:
    return all(abs(edge - wanted) <= slack for edge, wanted in zip(box, expected, strict=True))


def test_words_and_boxes(tmp_path: Path) -> None:
    def page(canvas: Canvas) -> None:
        canvas.drawString(100, 200, "Total due")
        canvas.drawString(300, 200, "7.10")

    [got] = read(draw(tmp_path / "a.pdf", page))
    assert (got.id, got.family, got.template) == ("a-p001", "pdf", "a")
    assert got.words == ["Total", "due", "7.10"]
    assert near(got.boxes[0], (250, 300, 305, 340))
    assert near(got.boxes[2], (750, 300, 800, 340))


def test_columns_are_read_one_after_the_other(tmp_path: Path) -> None:
    def page(canvas: Canvas) -> None:
        for x, words in ((50, "one two three"), (220, "four five six")):
            for line, word in enumerate(words.split()):
                canvas.drawString(x, 250 - 12 * line, f"{word} and")

    [got] = read(draw(tmp_path / "a.pdf", page))
    assert [word for word in got.words if word != "and"] == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("crop", [False, True])
def test_a_page_shown_rotated_is_read_as_shown(tmp_path: Path, rotation: int, crop: bool) -> None:
    """Text that the reader sees upright in the corner (30, 40) of what is visible, 30 points below its top."""
    inset = (20, 30, 50, 10) if crop else (0, 0, 0, 0)  # left, bottom, right, top of the unrotated page

    def page(canvas: Canvas) -> None:
        left, bottom, right, top = inset[0], inset[1], WIDTH - inset[2], HEIGHT - inset[3]
        if crop:
            canvas.setCropBox((left, bottom, right, top))
        x, y = {
            0: (left + 30, top - 40), 90: (left + 40, bottom + 30), 180: (right - 30, bottom + 40), 270: (right - 40, top - 30)
        }[rotation]  # fmt: skip
        canvas.translate(x, y)
        canvas.rotate(rotation)
        canvas.drawString(0, 0, "Total due")

    path = draw(tmp_path / "a.pdf", page)
    data = path.read_bytes()
    [old] = re.findall(rb"/Rotate 0\s+/Trans <<\s*>>", data)
    new = f"/Rotate {rotation} /Trans <<>>".encode()
    path.write_bytes(data.replace(old, new.ljust(len(old))))
    report = PdfReport()
    [got] = read(path, report)
    wide, high = WIDTH - inset[0] - inset[2], HEIGHT - inset[1] - inset[3]
    if rotation in (90, 270):
        wide, high = high, wide
    assert got.words == ["Total", "due"]
    expected = (30 / wide, 32 / high, 52 / wide, 42 / high)
    assert near(got.boxes[0], tuple(1000 * edge for edge in expected)), got.boxes[0]
    assert report.rotated_pages == (rotation != 0)
    assert report.clipped_boxes == report.words_outside == 0


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_page_drawn_turned_is_read_turned_back(tmp_path: Path, angle: int) -> None:
    def page(canvas: Canvas) -> None:
        canvas.translate(WIDTH / 2, HEIGHT / 2)
        canvas.rotate(angle)
        canvas.drawString(0, 0, "Total due now")
        canvas.drawString(0, -14, "7.10")
        canvas.rotate(-angle)
        canvas.drawString(-150, 100, "upright")

    report = PdfReport()
    [got] = read(draw(tmp_path / "a.pdf", page), report)
    assert got.words == ["Total", "due", "now", "7.10"]
    wide, high = (WIDTH, HEIGHT) if angle == 180 else (HEIGHT, WIDTH)
    assert near(got.boxes[0], (500, 500 - 8000 / high, 500 + 22000 / wide, 500 + 2000 / high))
    assert got.boxes[1][0] > got.boxes[0][2] > got.boxes[0][0] == got.boxes[3][0]
    assert got.boxes[3][1] > got.boxes[0][1]
    assert (report.rotated_pages, report.turned_words) == (1, 1)


def test_a_media_box_that_begins_elsewhere(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.pdf", lambda canvas: canvas.drawString(200, 200, "Total"))
    data = path.read_bytes()
    assert data.count(b"/MediaBox [ 0 0 400 300 ]") == 1
    path.write_bytes(data.replace(b"/MediaBox [ 0 0 400 300 ]", b"/MediaBox [ 100 50 400 300 ]"))
    [got] = read(path)
    assert near(got.boxes[0], (1000 / 3, 368, 1000 / 3 + 75, 410))


def test_words_at_and_beyond_the_edge_are_clipped_left_out_and_counted(tmp_path: Path) -> None:
    def page(canvas: Canvas) -> None:
        canvas.drawString(-10, 200, "Overhang")
        canvas.drawString(-90, 150, "Outside")
        canvas.drawString(50, 100, "inside")
        canvas.drawString(50, 500, "Above")

    report = PdfReport()
    [got] = read(draw(tmp_path / "a.pdf", page), report)
    assert got.words == ["Overhang", "inside"]
    assert got.boxes[0][0] == 0
    assert (report.clipped_boxes, report.words_outside, report.words, report.kept) == (1, 2, 2, 1)


def test_words_without_a_box_are_counted(tmp_path: Path) -> None:
    def page(canvas: Canvas) -> None:
        canvas.drawString(50, 100, "inside")
        canvas.saveState()
        canvas.scale(1e-9, 1)
        canvas.drawString(50e9, 50, "flat")
        canvas.restoreState()
        text = canvas.beginText(50, 150)
        text.setHorizScale(0)
        text.textOut("void")
        canvas.drawText(text)

    report = PdfReport()
    [got] = read(draw(tmp_path / "a.pdf", page), report)
    assert "inside" in got.words
    assert "void" not in got.words
    assert report.words_without_box >= 1


def test_words_drawn_twice_count_once(tmp_path: Path) -> None:
    def page(canvas: Canvas) -> None:
        canvas.drawString(50, 100, "bold word")
        canvas.drawString(50.3, 100, "bold word")
        canvas.drawString(50, 80, "word")

    report = PdfReport()
    [got] = read(draw(tmp_path / "a.pdf", page), report)
    assert (got.words, report.repeated_words) == (["bold", "word", "word"], 2)


def test_pages_without_words(tmp_path: Path) -> None:
    def scan(canvas: Canvas) -> None:
        canvas.drawImage(ImageReader(Image.new("L", (20, 20))), 0, 0, 400, 300)

    def blank(canvas: Canvas) -> None:
        canvas.rect(10, 10, 50, 50)

    def spaces(canvas: Canvas) -> None:
        canvas.drawString(10, 10, "   ")

    report = PdfReport()
    [got] = read(draw(tmp_path / "a.pdf", scan, blank, spaces, lambda canvas: canvas.drawString(9, 9, "text")), report)
    assert got.id == "a-p004"
    assert (report.pages, report.kept, report.pages_without_text, report.empty_pages) == (4, 1, 1, 2)
    assert "1 pages hold no text that can be read: run OCR on them first" in report.summary()


def test_pages_whose_font_maps_no_text_need_ocr_too(tmp_path: Path) -> None:
    """Glyph numbers of an embedded font, without a table that says which letters they are."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 300] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        "<< /Length 62 >>\nstream\nBT /F1 10 Tf 50 100 Td <004100420043> Tj 60 0 Td <00440045> Tj ET\nendstream",
        "<< /Type /Font /Subtype /Type0 /BaseFont /X /Encoding /Identity-H /DescendantFonts [6 0 R] >>",
        "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /X /DW 500 /CIDSystemInfo << /Registry (Adobe) /Ordering (Identity) "
        "/Supplement 0 >> /FontDescriptor << /Type /FontDescriptor /FontName /X /Ascent 800 /Descent -200 >> >>",
    ]
    body = "".join(f"{number} 0 obj\n{text}\nendobj\n" for number, text in enumerate(objects, 1))
    path = tmp_path / "a.pdf"
    path.write_text(f"%PDF-1.4\n{body}trailer << /Root 1 0 R >>\n%%EOF")
    report = PdfReport()
    assert read(path, report) == []
    assert (report.kept, report.unreadable_pages, report.broken_pages) == (0, 1, 0)
    assert "1 pages hold no text that can be read: run OCR" in report.summary()


def encrypted(path: Path, user: str) -> Path:
    canvas = Canvas(str(path), encrypt=StandardEncryption(user, ownerPassword="owner"))
    canvas.drawString(50, 100, "inside")
    canvas.save()
    return path


def test_an_encrypted_file_is_refused_unless_it_opens_without_a_password(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"locked\.pdf: is encrypted, and opens with a password only; expected a copy"):
        read(encrypted(tmp_path / "locked.pdf", "user"))
    [got] = read(encrypted(tmp_path / "open.pdf", ""))
    assert got.words == ["inside"]


def test_a_folder_goes_on_past_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    encrypted(tmp_path / "b.pdf", "user")
    (tmp_path / "c.pdf").write_bytes(b"no PDF")
    (tmp_path / "d.pdf").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not looked at")
    draw(tmp_path / "deep" / "e.PDF", lambda canvas: canvas.drawString(9, 9, "two"))
    draw(tmp_path / "a.pdf", lambda canvas: canvas.drawString(9, 9, "one"))
    report = PdfReport()
    pages = list(read_pdf_folder(tmp_path, report))
    assert [(page.id, page.template, page.words) for page in pages] == [
        ("a-p001", "a", ["one"]), ("deep/e-p001", "deep/e", ["two"])
    ]  # fmt: skip
    assert [Path(path).name for path in report.refused] == ["b.pdf", "c.pdf", "d.pdf"]
    assert all("not a PDF that can be read" in report.refused[str(tmp_path / name)] for name in ("c.pdf", "d.pdf"))
    assert (report.files, report.pages, report.kept) == (5, 2, 2)
    assert "is encrypted" in report.summary()
    with pytest.raises(TaskError, match=r"got no \.pdf file, expected at least one"):
        list(read_pdf_folder(tmp_path / "deep" / "none", PdfReport()))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pdf") / "good.pdf"
    return draw(
        path, lambda canvas: canvas.drawString(9, 9, "one"), lambda canvas: canvas.drawString(9, 9, "two")
    ).read_bytes()


@given(place=st.floats(0, 1), junk=st.binary(max_size=30), cut=st.booleans())
def test_a_damaged_file_is_read_or_refused(
    good: bytes, tmp_path_factory: pytest.TempPathFactory, place: float, junk: bytes, cut: bool
) -> None:
    at = int(place * len(good))
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "a.pdf").write_bytes(good[:at] + junk + (b"" if cut else good[at + len(junk) :]))
    report = PdfReport()
    pages = list(read_pdf_folder(folder, report))
    assert len(pages) == report.kept <= report.pages
    assert all("a.pdf" in reason for reason in report.refused.values())
    assert report.files == 1
