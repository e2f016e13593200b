"""Receipts: matching labels to words, both import forms, the split by company. The published receipts when they are there."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from engine.documents.entities import fields_from_tags
from engine.documents.fields import compare, total
from engine.documents.matching import Line, Place, Stream, tag_fields
from engine.documents.page import Page, TaskError
from engine.documents.split import company_groups, company_key, split_by_company
from engine.documents.sroie import WHERE, SroieReport, cut_line, read_sroie_folder, read_sroie_jsonl

RECEIPTS = Path(os.environ.get("HEADRACE_SROIE") or Path(__file__).parent.parent / "data" / "sroie_receipts.jsonl.gz")
needs_receipts = pytest.mark.skipif(
    not RECEIPTS.exists(),
    reason=f"needs receipts as JSON lines (engine/documents/sroie.py says how): {WHERE}; put them at "
    "data/sroie_receipts.jsonl.gz or name the file in HEADRACE_SROIE",
)

LINES = [
    ([100, 10, 300, 30], "ACME TRADING (M) SDN BHD"),
    ([100, 40, 300, 60], "NO. 1, JALAN SATU,"),
    ([100, 70, 300, 90], "81200 JOHOR"),
    ([100, 100, 300, 120], "DATE:01/02/2018"),
    ([100, 130, 200, 150], "SUB TOTAL"),
    ([300, 131, 340, 151], "14.10"),
    ([100, 160, 200, 180], "TAX TOTAL"),
    ([300, 160, 340, 180], "4.10"),
    ([100, 190, 200, 210], "TOTAL :"),
    ([300, 192, 340, 212], "4.10"),
    ([100, 220, 200, 240], "CASH"),
    ([300, 220, 340, 240], "4.10"),
    ([100, 250, 200, 270], "PAID 01/02/2018"),
]
FIELDS = {
    "company": "ACME TRADING (M) SDN BHD", "address": "No 1 Jalan Satu, 81200 Johor", "date": "01/02/2018", "total": "4.10"
}  # fmt: skip


def write_jsonl(path: Path, *receipts: dict) -> Path:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, receipts)).encode()))
    return path


def receipt(**changes: object) -> dict:
    lines = [{"box": box, "text": text} for box, text in LINES]
    return {"id": "r1", "width": 400, "height": 300, "lines": lines, "fields": FIELDS, **changes}


def tagged(page: Page) -> dict[str, list[int]]:
    assert page.tags is not None
    names = {tag[2:] for tag in page.tags if tag != "O"}
    return {name: [at for at, tag in enumerate(page.tags) if tag[2:] == name] for name in names}


def test_a_receipt_from_json_lines(tmp_path: Path) -> None:
    report = SroieReport()
    [page] = read_sroie_jsonl(write_jsonl(tmp_path / "r.jsonl.gz", receipt()), report)
    assert " ".join(page.words).startswith(
        "ACME TRADING (M) SDN BHD NO. 1, JALAN SATU, 81200 JOHOR DATE:01/02/2018 SUB"
    )
    found = {name: " ".join(page.words[at] for at in places) for name, places in tagged(page).items()}
    assert found == {
        "company": "ACME TRADING (M) SDN BHD", "address": "NO. 1, JALAN SATU, 81200 JOHOR",
        "date": "DATE:01/02/2018", "total": "4.10",
    }  # fmt: skip
    row = page.boxes[tagged(page)["total"][0]]
    assert row == (750, 640, 850, 706), (
        "the total on the row that says TOTAL, not the tax, not the cash, not within 14.10"
    )
    assert page.fields == FIELDS
    assert total(compare(fields_from_tags(page.words, page.tags or []), page.fields).values()).f1 == 1.0
    assert (report.pages, report.lines, report.words) == (1, 13, 25)
    assert report.missed == dict.fromkeys(FIELDS, 0)
    assert report.ambiguous == {"company": 0, "date": 1, "address": 0, "total": 1}


def test_a_line_is_cut_by_its_characters_spaces_included() -> None:
    assert cut_line("AB  C", (100, 0, 200, 9)) == [("AB", (100, 0, 140, 9)), ("C", (180, 0, 200, 9))]
    assert cut_line("  ", (100, 0, 200, 9)) == cut_line("", (0, 0, 1, 1)) == []


def test_a_label_that_stands_nowhere_is_a_miss(tmp_path: Path) -> None:
    report = SroieReport()
    fields = {**FIELDS, "company": "OTHER SDN BHD", "address": ""}
    [page] = read_sroie_jsonl(write_jsonl(tmp_path / "r.jsonl.gz", receipt(fields=fields)), report)
    assert set(tagged(page)) == {"date", "total"}
    assert page.fields["company"] == "OTHER SDN BHD"
    assert "address" not in page.fields
    assert (report.labelled["company"], report.missed["company"]) == (1, 1)
    assert (report.labelled["address"], report.missed["address"]) == (0, 0)


def lines_of(texts: list[str]) -> tuple[list[str], list[Line]]:
    words: list[str] = []
    lines = []
    for number, text in enumerate(texts):
        lines.append(Line((0, 10 * number, 100, 10 * number + 8), len(words), len(words) + len(text.split())))
        words += text.split()
    return words, lines


def test_a_text_may_run_over_eight_lines_and_no_more() -> None:
    for count, found in [(8, 1), (9, 0)]:
        words, lines = lines_of([f"part{number}" for number in range(count)])
        assert tag_fields(words, lines, {"address": " ".join(words)})[1] == {"address": found}


def test_the_total_without_a_row_of_its_name_is_the_last() -> None:
    words, lines = lines_of(["5.00", "SUBTOTAL 5.00", "CASH 5.00", "ROUNDED TOTAL 5.00", "x"])
    assert tag_fields(words, lines, {"total": "5.00"})[0].index("B-total") == 7
    words, lines = lines_of(["NET TOTAL 5.00", "CASH 5.00"])
    assert tag_fields(words, lines, {"total": "5.00"})[0].index("B-total") == 2


def test_a_row_of_tax_or_a_longer_number_is_not_the_total() -> None:
    words, lines = lines_of(["TOTAL 5.00", "TAX TOTAL 5.00", "CASH 5.00"])
    assert tag_fields(words, lines, {"total": "5.00"})[0].index("B-total") == 1
    words, lines = lines_of(["AMOUNT 4.10", "CASH 14.10"])
    assert tag_fields(words, lines, {"total": "4.10"})[0].index("B-total") == 1
    words, lines = lines_of(["AMOUNT 5.10", "CASH 14.10"])
    tags, counts = tag_fields(words, lines, {"total": "4.10"})
    assert (tags.index("B-total"), counts) == (3, {"total": 1}), "found, if only within another"


def test_no_word_has_two_fields() -> None:
    words, lines = lines_of(["ACME 1 ROAD", "ACME"])
    tags, counts = tag_fields(words, lines, {"address": "1 ROAD", "company": "ACME 1", "note": "ACME"})
    assert tags == ["B-company", "I-company", "O", "B-note"]
    assert counts == {"company": 1, "address": 0, "note": 1}


def test_places_know_whether_they_cut_a_number() -> None:
    stream = Stream(["RM14.10", "RM4.10", "14.10-4.10"])
    assert stream.places("4.10") == [
        Place(0, 1, False), Place(1, 2, True), Place(2, 3, False), Place(2, 3, True)
    ]  # fmt: skip
    assert stream.places("--") == []


def official(folder: Path, *, key: str = json.dumps(FIELDS), image: bool = True, box: str | None = None) -> Path:
    for name in ("box", "key", "img"):
        (folder / name).mkdir()
    quads = [f"{a},{b},{c},{b},{c},{d},{a},{d},{text}" for (a, b, c, d), text in LINES]
    (folder / "box" / "r1.csv").write_text("\n".join(quads) + "\n" if box is None else box, encoding="utf-8-sig")
    (folder / "key" / "r1.json").write_text(key)
    if image:
        Image.new("L", (400, 300)).save(folder / "img" / "r1.jpg")
    return folder


def test_the_official_folders_give_the_same_pages(tmp_path: Path) -> None:
    folder = official(tmp_path / "sroie" if (tmp_path / "sroie").mkdir() is None else tmp_path)
    report = SroieReport()
    [page] = read_sroie_folder(folder, report)
    [same] = read_sroie_jsonl(write_jsonl(tmp_path / "r.jsonl.gz", receipt()), SroieReport())
    assert page == same, "commas in a text are the text's own"
    assert report.sizes_from_boxes == 0


def test_without_an_image_the_page_ends_with_its_boxes(tmp_path: Path) -> None:
    report = SroieReport()
    [page] = read_sroie_folder(official(tmp_path, image=False), report)
    assert report.sizes_from_boxes == 1
    assert page.boxes[-1][3] == 1000


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no box/\*\.csv"):
        list(read_sroie_folder(tmp_path, SroieReport()))
    folder = official(tmp_path, box="1,2,3,4,5,6,7,8,TOTAL\n1,2,3,4,5,6,x,8,TOTAL\n")
    with pytest.raises(TaskError, match=r"r1\.csv:2: got '1,2,3,4,5,6,x,8,TOTAL', expected x1,y1"):
        list(read_sroie_folder(folder, SroieReport()))
    (folder / "box" / "r1.csv").write_bytes(b"1,2,3,4,5,6,7,8,CAF\xc9\n")
    [page] = read_sroie_folder(folder, SroieReport())
    assert page.words == ["CAFÉ"], "not UTF-8: Latin-1"
    (folder / "key" / "r1.json").write_text("[]")
    with pytest.raises(TaskError, match=r"r1\.json: got no JSON object of texts"):
        list(read_sroie_folder(folder, SroieReport()))
    (folder / "key" / "r1.json").unlink()
    with pytest.raises(TaskError, match=r"r1\.json: there is none, expected the labels"):
        list(read_sroie_folder(folder, SroieReport()))


def test_a_broken_receipt_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl.gz", receipt(), receipt(width=0))
    with pytest.raises(TaskError, match=r"r\.jsonl\.gz:2: got a page of 0 x 300 pixels"):
        list(read_sroie_jsonl(path, SroieReport()))
    path = write_jsonl(tmp_path / "r.jsonl.gz", receipt(lines=[{"text": "a"}]))
    with pytest.raises(TaskError, match=r"r\.jsonl\.gz:1: not a receipt: .*`box` - at `\$.lines"):
        list(read_sroie_jsonl(path, SroieReport()))


# --- companies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["MR. D. I. Y. (M) SDN BHD", "MR.D.I.Y(M)SDN BHD", "MR D.I.Y. (JOHOR) SDN BHD", "mr d.i.y."],
        ["AEON CO. (M) BHD", "AEON CO. (M) BHD.", "AEON"],
        ["RESTORAN WAN SHENG", "RSTORAN WAN SHENG"],
        ["GH DISTRIBUTOR & MARKETING SDN BHD", "GHEE HIANG GH DISTRIBUTOR & MARKETING S/B"],
    ],
)
def test_variants_of_a_name_are_one_company(names: list[str]) -> None:
    others = ["SUNFISH", "ASIA MART", "BHPETROL PERMAS JAYA 2"]
    groups = company_groups([*names, *others])
    assert len({groups[name] for name in names}) == 1
    assert len(set(groups.values())) == 1 + len(others)


def test_a_name_of_legal_forms_alone_keeps_them() -> None:
    assert company_key("Sdn. Bhd.") == "sdn"
    assert company_key("(M)") == "m"


def test_the_split_parts_companies_and_does_not_depend_on_order() -> None:
    names = [f"{'ABCDEFGH'[n % 8] * 4} {n % 16 // 8 * 'SDN'}" for n in range(80)]
    pages = [Page(id=str(n), words=[], boxes=[], fields={"company": name}) for n, name in enumerate(names)]
    pages += [Page(id=f"none{n}", words=[], boxes=[]) for n in range(4)]
    rest, test = split_by_company(pages, 0.25, seed=1)
    assert sorted([*rest, *test], key=lambda page: page.id) == sorted(pages, key=lambda page: page.id)
    assert 10 <= len(test) <= 32
    assert not {company_key(p.fields.get("company", "")) for p in rest if p.fields} & {
        company_key(p.fields.get("company", "")) for p in test if p.fields
    }
    again = split_by_company(pages[::-1], 0.25, seed=1)
    assert again == (rest[::-1], test[::-1])
    assert {len(split_by_company(pages, part)[1]) for part in (0.0, 1.0)} == {0, 84}
    with pytest.raises(ValueError, match="fraction: got 20, expected 0 to 1"):
        split_by_company(pages, 20)


# --- the published receipts ----------------------------------------------------------------------------------------


@needs_receipts
def test_the_published_receipts() -> None:
    report = SroieReport()
    pages = list(read_sroie_jsonl(RECEIPTS, report))
    assert report.clipped_boxes == 0
    found = {name: 1 - report.missed[name] / report.labelled[name] for name in report.labelled}
    # all 626: company 613, date 623, address 590 of 625, total 625
    assert found["company"] == pytest.approx(613 / 626, abs=0.01)
    assert found["date"] == pytest.approx(623 / 626, abs=0.01)
    assert found["address"] == pytest.approx(590 / 625, abs=0.02)
    assert found["total"] == pytest.approx(625 / 626, abs=0.01)
    if report.pages == 500:
        assert (report.lines, report.words) == (26_674, 57_657)
        assert report.missed == {"company": 11, "date": 3, "address": 31, "total": 0}
    # what the tags can give at best: each label that stands on its page, but for words that hold more
    scores = [total(compare(fields_from_tags(page.words, page.tags or []), page.fields).values()) for page in pages]
    assert total(scores).f1 > 0.98
    assert total(scores).precision > 0.995
    rest, test = split_by_company(pages, 0.2)
    assert len(test) == pytest.approx(0.2 * len(pages), abs=10)
    assert not {page.fields["company"] for page in rest} & {page.fields["company"] for page in test}
