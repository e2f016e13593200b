"""The encoder: its size, its two forms, what moves its output and what does not."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import Tensor

from engine.utel.model import Utel, UtelConfig
from engine.utel.relative import PlainTerms

TINY = UtelConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
    max_position_embeddings=600, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
TINIEST = msgspec.structs.replace(TINY, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
ARMS = [
    {},
    {"clip_distance": 0},
    {"clip_distance": 7},
    {"clip_distance": 100},
    {"clip_distance": None},
    {"sequence_term": "absolute"},
    {"sequence_term": "none"},
]


def inputs(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens and boxes; the last row is whole, the others are padded behind ever fewer tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, TINY.vocab_size, (batch, length), generator=generator)
    boxes = torch.randint(0, 1001, (batch, length, 4), generator=generator)
    lengths = torch.linspace(max(1, length // 2), length, batch).long() if batch > 1 else torch.tensor([length])
    return ids, boxes, torch.arange(length)[None] < lengths[:, None]


def twins(config: UtelConfig, dtype: torch.dtype = torch.float32) -> tuple[Utel, Utel]:
    """The fast and the plain form of one model, whose relative terms are large enough to matter."""
    torch.manual_seed(1)
    fast = Utel(msgspec.structs.replace(config, attention="fast")).to(dtype)
    with torch.no_grad():
        for name, parameter in fast.named_parameters():
            if "_projection" in name:
                parameter.mul_(10)
    plain = Utel(msgspec.structs.replace(config, attention="plain")).to(dtype)
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def gradients(model: Utel, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
    (torch.where(mask[..., None], hidden, 0.0).pow(3).sum() / mask.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("config", "parameters"), [(UtelConfig.base(), 110_686_464), (UtelConfig.large(), 336_747_520)]
)
def test_the_sizes_are_those_of_the_published_readme(config: UtelConfig, parameters: int) -> None:
    with torch.device("meta"):
        model = Utel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_small_one_is_small() -> None:
    assert sum(parameter.numel() for parameter in Utel(UtelConfig.small()).parameters()) < 12_000_000


@pytest.mark.parametrize("arm", ARMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_form_is_the_plain_one(arm: dict, dtype: torch.dtype) -> None:
    fast, plain = twins(msgspec.structs.replace(TINY, **arm), dtype)
    ids, boxes, mask = inputs(3, 130)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    of_fast, of_plain = fast(ids, boxes, mask), plain(ids, boxes, mask)
    assert torch.allclose(of_fast[mask], of_plain[mask], rtol=0, atol=tolerance)
    expected = gradients(plain, of_plain, mask)
    for name, gradient in gradients(fast, of_fast, mask).items():
        assert torch.allclose(gradient, expected[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize("length", [1, 512, 513, 2048])
def test_any_length_runs_and_the_forms_agree(length: int) -> None:
    fast, plain = twins(TINIEST)
    ids, boxes, mask = inputs(1, length)
    with torch.no_grad():
        assert torch.allclose(fast(ids, boxes, mask), plain(ids, boxes, mask), rtol=0, atol=1e-5)


def test_eight_thousand_tokens() -> None:
    ids, boxes, _ = inputs(1, 8192)
    with torch.no_grad():
        hidden = twins(TINIEST)[0](ids, boxes)
    assert hidden.shape == (1, 8192, TINIEST.hidden_size)
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("arm", ARMS[:5], ids=str)
@pytest.mark.parametrize("form", ["fast", "plain"])
def test_shifting_the_places_changes_nothing(arm: dict, form: str) -> None:
    model = twins(msgspec.structs.replace(TINY, **arm), torch.float64)[form == "plain"]
    ids, boxes, mask = inputs(2, 60)
    places = torch.arange(60).expand(2, 60)
    expected = model(ids, boxes, mask)
    for shift in (0, 5000):
        assert torch.allclose(model(ids, boxes, mask, places + shift)[mask], expected[mask], rtol=0, atol=1e-9)


@pytest.mark.parametrize("arm", ARMS[:5], ids=str)
def test_rows_may_have_places_of_their_own(arm: dict) -> None:
    """Neither consecutive nor shared: each row comes out as it does alone, in both forms."""
    fast, plain = twins(msgspec.structs.replace(TINY, **arm), torch.float64)
    ids, boxes, mask = inputs(3, 40)
    places = torch.stack([torch.randperm(300, generator=torch.Generator().manual_seed(row))[:40] for row in range(3)])
    together = fast(ids, boxes, mask, places)
    assert torch.allclose(together[mask], plain(ids, boxes, mask, places)[mask], rtol=0, atol=1e-12)
    for row in range(3):
        alone = fast(*(x[row : row + 1, : int(mask[row].sum())] for x in (ids, boxes, mask, places)))
        assert torch.allclose(together[row, mask[row]], alone[0], rtol=0, atol=1e-12)
    if arm.get("clip_distance") != 0:
        assert not torch.allclose(together[mask], fast(ids, boxes, mask)[mask], atol=1e-6)


def test_the_order_counts_unless_there_is_no_sequence_term() -> None:
    ids, boxes, _ = inputs(1, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for term in ("relative", "absolute", "none"):
        model = twins(msgspec.structs.replace(TINY, sequence_term=term), torch.float64)[0]
        same = torch.allclose(model(ids[:, order], boxes[:, order]), model(ids, boxes)[:, order], atol=1e-9)
        assert same == (term == "none"), term


def test_padding_does_not_reach_the_tokens() -> None:
    model = twins(TINY, torch.float64)[0]
    ids, boxes, mask = inputs(3, 50)
    other_ids, other_boxes = torch.where(mask, ids, 7), torch.where(mask[..., None], boxes, 500)
    assert torch.equal(model(ids, boxes, mask)[mask], model(other_ids, other_boxes, mask)[mask])
    assert torch.isfinite(model(ids, boxes, torch.zeros_like(mask))).all()


def test_the_relative_term_of_the_boxes_does_not_move_with_the_page() -> None:
    """The model does move: its absolute tables remain."""
    model = twins(TINY, torch.float64)[1]
    ids, boxes, _ = inputs(1, 20)
    boxes = boxes // 2

    def relative(shift: int) -> Tensor:
        terms = model.embeddings.terms(boxes + shift, torch.arange(20)[None], None)
        assert isinstance(terms, PlainTerms)
        return terms.box_terms

    assert torch.equal(relative(0), relative(300))
    assert not torch.allclose(model(ids, boxes), model(ids, boxes + 300))


def test_the_box_term_is_of_key_minus_query_by_coordinate() -> None:
    """b_ij by hand, for one pair: four coordinates, sines and then cosines of each."""
    model = twins(TINY, torch.float64)[1]
    boxes = torch.tensor([[[100, 200, 300, 250], [130, 190, 340, 260]]])
    terms = model.embeddings.terms(boxes, torch.tensor([[4, 99]]), None)
    assert isinstance(terms, PlainTerms)
    assert terms.sequence_terms is not None
    w = 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)  # D = 16: 4 numbers a coordinate
    angle = torch.tensor([30.0, -10.0, 40.0, 10.0]).double()[:, None] * w
    by_hand = model.embeddings.bbox_projection.weight @ torch.cat([angle.sin(), angle.cos()], dim=-1).flatten()
    assert torch.allclose(terms.box_terms[0, 0, 1], by_hand)
    w = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    by_hand = model.embeddings.seq_projection.weight @ torch.cat([(50 * w).sin(), (50 * w).cos()])  # 95, clipped
    assert torch.allclose(terms.sequence_terms[0, 0, 1], by_hand)


def test_boxes_are_cut_to_the_page() -> None:
    model = twins(TINY)[0]
    ids, boxes, _ = inputs(2, 10)
    boxes[0, 0], boxes[1, 1] = torch.tensor([-5, 0, 1200, 1001]), torch.tensor([3000, -1, 1000, 0])
    assert torch.equal(model(ids, boxes), model(ids, boxes.clamp(0, 1000)))


def test_a_short_absolute_table_says_what_does_not_fit() -> None:
    model = twins(msgspec.structs.replace(TINY, sequence_term="absolute", max_position_embeddings=16))[0]
    ids, boxes, _ = inputs(1, 17)
    model(ids[:, :16], boxes[:, :16])
    with pytest.raises(ValueError, match="position_ids: got 0 to 16, expected 0 to 15"):
        model(ids, boxes)


def test_dropout_is_of_training_alone() -> None:
    model = Utel(msgspec.structs.replace(TINY, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))
    ids, boxes, mask = inputs(2, 30)
    assert not torch.equal(model(ids, boxes, mask), model(ids, boxes, mask))
    model.eval()
    assert torch.equal(model(ids, boxes, mask), model(ids, boxes, mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 66}, r"hidden_size: got 66, expected a multiple of num_attention_heads \(4\)"),
        ({"hidden_size": 48}, "hidden_size: got 48, expected a multiple of 32"),
        ({"clip_distance": -1}, "clip_distance: got -1, expected 0 or more"),
        ({"max_2d_position_embeddings": 1000}, "expected more than 1000"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: got 1.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: got 0, expected at least 1"),
        ({"pad_token_id": 100}, "pad_token_id: got 100, expected 0 to 99"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.convert({**msgspec.to_builtins(TINY), **change}, UtelConfig)


def test_inputs_that_do_not_fit_are_refused() -> None:
    model = twins(TINY)[0]
    ids, boxes, mask = inputs(2, 5)
    with pytest.raises(ValueError, match=r"boxes: got shape \[2, 5, 3\], expected \[2, 5, 4\]"):
        model(ids, boxes[..., :3])
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[2, 4\]"):
        model(ids, boxes, mask[:, :4])
    with pytest.raises(ValueError, match=r"boxes: got torch.float32, expected integers"):
        model(ids, boxes.float())
