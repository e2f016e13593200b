"""Synthetic pages: exact labels, splits that share nothing, twins that only layout tells apart, noise."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.documents.decisive import FAMILY, text_only_ceiling
from engine.documents.drawing import LEAST_OVERLAP, Sheet, SynthesisError, Word, labelled, read_back
from engine.documents.entities import fields_from_tags
from engine.documents.fields import compare, total
from engine.documents.invented import Split, Values
from engine.documents.noise import CLEAN, Noise, add_noise
from engine.documents.page import Page
from engine.documents.synthetic import HELD_OUT_FAMILY, TEMPLATES, held_out, synthesize, templates
from engine.documents.tags import spans, tag_fault
from engine.documents.templates import FAMILIES, style
from engine.documents.values import read_amount, read_date

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@pytest.fixture(scope="module")
def pages() -> dict[Split, list[Page]]:
    return {split: list(synthesize(split, 40, seed=3, decisive=0.3)) for split in SPLITS}


def every(pages: dict[Split, list[Page]]) -> list[Page]:
    return [page for split in SPLITS for page in pages[split]]


def test_the_labels_of_a_page_can_be_read_off_its_tagged_words(pages: dict[Split, list[Page]]) -> None:
    for page in every(pages):
        assert page.tags is not None
        assert fields_from_tags(page.words, page.tags) == page.fields
        assert total(compare(page.fields, page.fields).values()).f1 == 1.0
        assert {span.type for span in spans(page.tags)} == page.fields.keys()


def test_links_lead_from_keys_to_values(pages: dict[Split, list[Page]]) -> None:
    linked = [(page, key, value) for page in every(pages) for key, value in page.links]
    assert len(linked) > 200
    for page, key, value in linked:
        assert page.tags is not None
        assert page.tags[key] == "O"
        assert not page.tags[value].startswith("I-")
        beside, below = page.boxes[value][0] > page.boxes[key][0], page.boxes[value][1] > page.boxes[key][1]
        assert beside or below


def test_dates_and_amounts_are_such(pages: dict[Split, list[Page]]) -> None:
    for page in every(pages):
        for name, value in page.fields.items():
            if name.endswith("date"):
                assert read_date(value), value
            if name in ("total", "tax", "subtotal", "opening_balance", "closing_balance"):
                assert read_amount(value), value


def test_a_page_is_a_function_of_split_seed_and_place(pages: dict[Split, list[Page]]) -> None:
    again = list(synthesize("train", 40, seed=3, decisive=0.3))
    assert again == pages["train"]
    other = list(synthesize("train", 8, seed=4))
    assert not {tuple(page.words) for page in other} & {tuple(page.words) for page in pages["train"]}
    assert len({page.id for page in every(pages)}) == 120


def test_splits_share_no_template_and_no_value(pages: dict[Split, list[Page]]) -> None:
    drawn = {split: {page.template for page in pages[split]} for split in SPLITS}
    assert not drawn["test"] & (drawn["train"] | drawn["dev"])
    assert HELD_OUT_FAMILY in {page.family for page in pages["test"]}
    assert HELD_OUT_FAMILY not in {page.family for page in pages["train"] + pages["dev"]}
    for field in ("company", "buyer", "name", "address", "email", "phone", "invoice_number", "date", "total"):
        values = [{page.fields[field] for page in pages[split] if field in page.fields} for split in SPLITS]
        if field == "date":  # each written in many ways
            values = [{read_date(value) or "" for value in split} for split in values]
        if field == "total":
            values = [{read_amount(value) or "" for value in split} for split in values]
        assert all(values)
        assert not values[0] & values[1] | values[0] & values[2] | values[1] & values[2], field


@pytest.mark.parametrize("draw", ["company", "person", "day", "cents"])
def test_what_a_split_draws_no_other_draws(draw: str) -> None:
    look = style("invoice", 0)
    train, dev, test = ({getattr(Values(split, str(n), look), draw)() for n in range(300)} for split in SPLITS)
    assert not train & dev | train & test | dev & test


def test_templates_held_out_are_a_quarter_and_a_family() -> None:
    train, test = templates("train"), templates("test")
    assert len(train) == (len(FAMILIES) - 1) * TEMPLATES * 3 // 4
    assert len(train) + len(test) == len(FAMILIES) * TEMPLATES
    assert templates("dev") == train
    assert all(held_out(HELD_OUT_FAMILY, number) for number in range(TEMPLATES))


@pytest.mark.parametrize(
    ("family", "number"), [(family, number) for family in FAMILIES for number in range(0, TEMPLATES, 3)]
)
def test_templates_draw_what_is_read(family: str, number: int) -> None:
    sheets = []
    for seed in "ab":
        sheet = Sheet(style(family, number), f"{family}-{seed}")
        FAMILIES[family](sheet, Values("train", seed, sheet.style))
        sheets.append(sheet)
    for page in read_back(sheets):
        assert page.template == f"{family}-{number:02d}"
        assert all(x0 > 0 and x1 < 1000 and y1 < 1000 for x0, _, x1, y1 in page.boxes), "nothing runs off the page"


def test_a_word_that_does_not_read_as_drawn_is_an_error() -> None:
    def sheet() -> Sheet:
        sheet = Sheet(style("form", 0), "page-7")
        sheet.put(["Total due"], 100, 100)
        return sheet

    touching = sheet()
    due = touching.words[-1]
    touching.words.append(Word("now", due.x + touching.width("due"), 100, due.font, due.size))
    with pytest.raises(SynthesisError, match=r"page-7: word 1: read 'duenow', drawn 'due'"):
        read_back([touching])
    outside = sheet()
    outside.words.append(Word("gone", -100, 100, "Helvetica", 9))
    with pytest.raises(SynthesisError, match="page-7: read 2 words, drawn 3"):
        read_back([sheet(), outside])
    hanging = sheet()
    hanging.words.append(Word("overhang", -30, 200, "Helvetica", 9))
    with pytest.raises(SynthesisError, match="1 words run off the page, expected none"):
        read_back([hanging])
    [good] = read_back([sheet()])
    shifted = [(x0 + 30, y0, x1 + 30, y1) for x0, y0, x1, y1 in good.boxes]
    with pytest.raises(SynthesisError, match=r"page-7: word 0 'Total': read at .*, expected more than 0\.5"):
        labelled(sheet(), msgspec.structs.replace(good, boxes=shifted))
    with pytest.raises(SynthesisError, match=r"got 1 pages, expected 2: .*empty pages 1"):
        read_back([sheet(), Sheet(style("form", 0), "blank")])
    twice = sheet()
    twice.put(["1"], 100, 200, field="total")
    with pytest.raises(SynthesisError, match="field 'total': drawn twice, '1' and '2'"):
        twice.put(["2"], 100, 220, field="total")


# --- twins ---------------------------------------------------------------------------------------------------------


def twins(pages: list[Page]) -> list[tuple[Page, Page]]:
    drawn = [page for page in pages if page.family == FAMILY]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def test_twins_have_the_same_words_and_other_roles(pages: dict[Split, list[Page]]) -> None:
    for split in SPLITS:
        pairs = twins(pages[split])
        assert len(pairs) == 6
        for one, two in pairs:
            assert one.id[:-2] == two.id[:-2]
            assert one.words == two.words
            assert one.tags != two.tags
            assert one.boxes != two.boxes
            assert sorted(one.fields) == sorted(two.fields)


def test_reading_without_layout_is_right_on_one_twin_at_most(pages: dict[Split, list[Page]]) -> None:
    assert text_only_ceiling([page for page in every(pages) if page.family == FAMILY]) == 0.5
    assert text_only_ceiling([page for page in every(pages) if page.family != FAMILY]) == 1.0
    assert text_only_ceiling([]) == 1.0
    with pytest.raises(ValueError, match="page a: has no tags"):
        text_only_ceiling([Page(id="a", words=[], boxes=[])])


def test_the_order_of_words_says_nothing_about_their_places() -> None:
    pages = [page for page in synthesize("train", 120, seed=5, decisive=1.0) if page.id.endswith("-a")]
    first_key_leads = first_value_leads = 0
    for page in pages:
        (key, value), (other_key, other_value) = sorted(page.links)
        first_key_leads += page.boxes[key][:2] < page.boxes[other_key][:2]
        value, other_value = sorted((value, other_value))
        first_value_leads += page.boxes[value][:2] < page.boxes[other_value][:2]
    assert 0.25 < first_key_leads / len(pages) < 0.75
    assert 0.25 < first_value_leads / len(pages) < 0.75


def test_a_reader_of_places_is_right_on_both_twins() -> None:
    """The value of a key stands beside it or below it: that alone finds every field."""
    names = {"seller": "company", "buyer": "buyer", "issued": "date", "due": "due_date", "total": "total",
             "subtotal": "subtotal", "opening": "opening_balance", "closing": "closing_balance"}  # fmt: skip
    for page in synthesize("train", 40, seed=9, decisive=1.0):
        assert page.tags is not None
        for span in spans(page.tags):
            x0, y0, _, _ = page.boxes[span.start]
            keys = [index for index, word in enumerate(page.words) if word.strip(":").casefold() in names]
            nearest = min(keys, key=lambda key: min(abs(page.boxes[key][1] - y0), 3 * abs(page.boxes[key][0] - x0)))
            assert names[page.words[nearest].strip(":").casefold()] == span.type


def test_twins_stay_twins_under_noise() -> None:
    noisy = list(synthesize("train", 24, decisive=1.0, noise=Noise(swaps=0.1, drops=0.1)))
    assert all(one.words == two.words for one, two in twins(noisy))
    assert text_only_ceiling(noisy) <= 0.55


# --- noise ---------------------------------------------------------------------------------------------------------


def test_noise_is_as_strong_as_it_says(pages: dict[Split, list[Page]]) -> None:
    noise = Noise(jitter=0.005, swaps=0.02, drops=0.03)
    words = kept = chars = changed = 0
    for page in pages["train"]:
        noisy = add_noise(page, noise, page.id)
        assert noisy == add_noise(page, noise, page.id)
        assert noisy.fields == page.fields
        words, kept = words + len(page.words), kept + len(noisy.words)
        moved = add_noise(page, msgspec.structs.replace(noise, drops=0.0), page.id)
        for before, after in zip(page.boxes, moved.boxes, strict=True):
            assert all(abs(a - b) <= 5 for a, b in zip(before, after, strict=True))
        chars += sum(map(len, page.words))
        changed += sum(a != b for a, b in zip(page.words, moved.words, strict=True))
    assert 1 - kept / words == pytest.approx(0.03, abs=0.012)
    assert changed / chars == pytest.approx(0.02, abs=0.006)


rate = st.sampled_from([0.0, 0.01, 0.3, 0.9])


@settings(max_examples=60)
@given(
    st.builds(Noise, jitter=rate, swaps=rate, drops=rate, shuffle=st.booleans()),
    st.text(max_size=5),
    st.integers(0, 39),
)
def test_noisy_pages_are_pages(pages: dict[Split, list[Page]], noise: Noise, seed: str, index: int) -> None:
    page = pages["train"][index]
    noisy = add_noise(page, noise, seed)
    assert noisy.tags is not None
    assert tag_fault(noisy.tags) is None
    before = [span.type for span in spans(page.tags or [])]
    assert not {span.type for span in spans(noisy.tags)} - set(before)
    assert len(spans(noisy.tags)) <= len(before)
    if noise.drops == 0:
        assert len(spans(noisy.tags)) == len(before)
        assert len(noisy.links) == len(page.links)
    if noise == CLEAN:
        assert noisy is page
    if noise.drops == noise.swaps == 0:
        assert sorted(noisy.words) == sorted(page.words)
        assert fields_from_tags(noisy.words, noisy.tags) == page.fields
    if noise.drops == noise.swaps == 0 and noise.shuffle:
        linked = {(page.words[key], page.words[value]) for key, value in page.links}
        assert {(noisy.words[key], noisy.words[value]) for key, value in noisy.links} == linked


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decisive: got 2, expected 0 to 1"):
        next(synthesize("train", 1, decisive=2))
    with pytest.raises(ValueError, match=r"count: got -1, expected at least 0"):
        next(synthesize("train", -1))
    with pytest.raises(ValueError, match=r"noise\.drops: got 1\.5, expected 0 to 1"):
        Noise(drops=1.5)
    assert list(synthesize("train", 0)) == []
    assert len(list(synthesize("train", 1, decisive=1.0))) == 1
    assert LEAST_OVERLAP == 0.5
