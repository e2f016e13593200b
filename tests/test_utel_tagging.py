"""Tags to labels and back, windows put together again, and eight pages learnt by heart."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config_section import ConfigError
from engine.documents.entities import score_tags
from engine.documents.tags import spans
from engine.utel.encode import EncodedPage, encode_page
from engine.utel.folder import load_utel, save_folder
from engine.utel.habits import Habits
from engine.utel.model import Utel
from engine.utel.tagging import (
    Tagging,
    UtelTagger,
    likeliest_tags,
    load_tagger,
    make_labels,
    predict_logits,
    save_tagger,
    to_labels,
    to_tags,
)
from tests.utel_pages import STILL, TINY, make_boxes, make_page, make_pieces, make_words

PIECES = make_pieces()
BIES, BIO = make_labels(["a", "b"]), make_labels(["a", "b"], "BIO")


def read(model: UtelTagger, pages: list[EncodedPage], **how: int) -> list[list[str]]:
    """The likeliest tags of pages, as an evaluation takes them."""
    return [likeliest_tags(logits, model.labels) for logits in predict_logits(model, PIECES, pages, **how)]


def test_labels() -> None:
    assert BIES == ["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "E-b", "S-b"]
    assert BIO == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert len(make_labels(["header", "question", "answer"])) == 13
    tags = ["B-a", "I-a", "I-a", "O", "B-b", "B-a", "I-a"]
    assert [BIES[n] for n in to_labels(tags, BIES)] == ["B-a", "I-a", "E-a", "O", "S-b", "B-a", "E-a"]
    assert [BIO[n] for n in to_labels(tags, BIO)] == tags
    with pytest.raises(ValueError, match="got 'S-c', expected one of O, B-a"):
        to_labels(["B-c"], BIES)


@given(pieces=st.lists(st.tuples(st.sampled_from(["O", "a", "b"]), st.integers(1, 3)), max_size=12))
def test_tags_come_back_from_both_schemes(pieces: list[tuple[str, int]]) -> None:
    tags = [tag for type_, length in pieces for tag in
            (["O"] * length if type_ == "O" else [f"B-{type_}", *[f"I-{type_}"] * (length - 1)])]  # fmt: skip
    for labels in (BIES, BIO):
        assert to_tags(to_labels(tags, labels).tolist(), labels) == tags


@pytest.mark.parametrize(
    ("labels", "tags"),
    [
        (["I-a", "E-a", "O", "E-b"], ["B-a", "I-a", "O", "B-b"]),
        (["B-a", "I-b", "E-b", "S-b", "S-b"], ["B-a", "B-b", "I-b", "B-b", "B-b"]),
        (["B-a", "E-a", "E-a"], ["B-a", "I-a", "I-a"]),
    ],
)
def test_labels_in_no_order_still_are_tags(labels: list[str], tags: list[str]) -> None:
    assert to_tags([BIES.index(label) for label in labels], BIES) == tags
    assert spans(tags)


def pages_and_tags(count: int) -> tuple[list[EncodedPage], list[list[str]]]:
    """Entities of one to three words, placed at random: what they are can only be learnt by heart."""
    pages, tags = [], []
    for seed in range(count):
        words, random = make_words(40, seed), np.random.default_rng(seed)
        own = ["O"] * 40
        for start in range(0, 40, 4):
            type_, length = random.choice(["a", "b", ""]), random.integers(1, 4)
            if type_:
                own[start : start + length] = [f"B-{type_}", *[f"I-{type_}"] * (length - 1)]
        pages.append(encode_page(PIECES, words, make_boxes(40), id=str(seed)))
        tags.append(own)
    return pages, tags


def test_eight_pages_are_learnt_by_heart() -> None:
    torch.manual_seed(0)
    pages, tags = pages_and_tags(8)
    objective, model = Tagging(BIES, PIECES), UtelTagger(Utel(STILL), BIES)
    prepared = objective.prepare(pages, tags)
    [batch] = objective.micro_batches(prepared, token_budget=100_000)
    steps = 260
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 10) * (1 - step / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = objective.loss(model, batch, prepared.counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if loss < 0.01:
            break
    scores = score_tags(tags, read(model, pages))
    assert scores.strict.micro.f1 > 0.99
    assert scores.missing_words == 0


def test_the_loss_does_not_depend_on_the_split() -> None:
    torch.manual_seed(0)
    pages, tags = pages_and_tags(5)
    objective, model = Tagging(BIO, PIECES, length=50), UtelTagger(Utel(STILL), BIO)
    prepared = objective.prepare(pages, tags)
    results = []
    for budget in (100_000, 70):
        sums = {name: np.zeros(length) for name, length in objective.sums.items()}
        loss = 0.0
        for batch in objective.micro_batches(prepared, token_budget=budget):
            one, found = objective.loss(model, batch, prepared.counts)
            loss += one.item()
            for name, value in found.items():
                sums[name] += value.numpy()
        results.append((loss, objective.metrics(sums)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert results[0][0] == pytest.approx(results[0][1]["tag_loss"], rel=1e-5)
    assert prepared.counts == {"tag": 200.0}


def test_a_word_in_two_windows_is_tagged_where_it_is_in_the_middle() -> None:
    """A classifier that only reads the place in the window tells which window a word was taken from."""
    page = encode_page(PIECES, ["a"] * 20, make_boxes(20), id="x")
    utel = Utel(msgspec.structs.replace(STILL, sequence_term="absolute", num_hidden_layers=1))
    model = UtelTagger(utel, ["O", "B-a"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        utel.embeddings.LayerNorm.weight.fill_(1.0)
        for layer in utel.encoder.layer:
            layer.attention["output"].LayerNorm.weight.fill_(1.0)
            layer.output.LayerNorm.weight.fill_(1.0)
        table = utel.embeddings.position_embeddings.weight
        table[:, 0] = -1.0
        table[5:, 0] = 1.0  # from the fifth word of a window on
        model.classifier.weight[1, 0] = 1.0
    tags = read(model, [page], length=12, overlap=4)  # windows of 10: words 0-9, 6-15, 12-19
    by_hand = [0] * 4 + [1] * 4 + [0] * 2 + [1] * 4 + [0] * 2 + [1] * 4
    assert [int(tag == "B-a") for tag in tags[0]] == by_hand


def test_pages_of_any_length_and_none() -> None:
    torch.manual_seed(0)
    model = UtelTagger(Utel(STILL), BIES)
    pages = [make_page(PIECES, count, count) for count in (0, 1, 300, 7)]
    tags = read(model, pages, length=64, overlap=16, token_budget=200)
    assert [len(own) for own in tags] == [0, 1, 300, 7]
    assert read(model, []) == []
    with pytest.raises(ValueError, match="page 'page-7': got 1 tags, expected one for each of the 7 words"):
        Tagging(BIES, PIECES).prepare([pages[3]], [["O"]])


def test_a_tagger_comes_back_with_its_labels_and_habits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pages = [make_page(PIECES, 30, 1)]
    model = UtelTagger(Utel(TINY), BIES, {"total": Habits(ends=2.5, odd_cents=1.25)})
    save_tagger(tmp_path / "tagger", model, PIECES)
    loaded = load_tagger(tmp_path / "tagger")
    assert (loaded.labels, loaded.habits) == (tuple(BIES), model.habits)
    assert read(loaded, pages) == read(model, pages)
    encoder = load_utel(tmp_path / "tagger")
    assert all(torch.equal(weight, model.utel.state_dict()[name]) for name, weight in encoder.state_dict().items())
    save_folder(tmp_path / "encoder", model.utel, TINY, PIECES)
    with pytest.raises(ConfigError, match="id2label: got None"):
        load_tagger(tmp_path / "encoder")
    config = tmp_path / "tagger" / "config.json"
    config.write_text(config.read_text().replace('"odd_cents": 1.25', '"odd_cents": "1.25"'))
    with pytest.raises(ConfigError, match=r"habits: Expected `float`, got `str` - at `\$\[\.\.\.\]\.odd_cents`"):
        load_tagger(tmp_path / "tagger")
