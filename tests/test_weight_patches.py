"""Sparse updates: exact to the bit, small, and refused where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor
from torch.distributed import Store
from weights_peer import FaultyTransport, equal_bits

from engine.weights import GlooTransport, Publisher, Seat, Subscriber, Terms, Transport
from engine.weights.patch import BLOCK_BYTES, PatchLayout, Piece, make_patch
from engine.weights.roster import Member, Roster
from engine.weights.update import Shelf


def changed_at(entries: int, unit: int, places: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Two buffers of `entries` random entries that differ at `places` and nowhere else."""
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 256, [entries, unit], dtype=np.uint8)
    new = old.copy()
    new[places] ^= rng.integers(1, 256, [len(places), unit], dtype=np.uint8)
    return torch.from_numpy(old.reshape(-1)), torch.from_numpy(new.reshape(-1))


@given(st.sampled_from([1, 2, 4, 8]), st.sets(st.integers(0, 4999)), st.integers(0, 2**32 - 1))
@example(2, {0, 256, 513, 4999}, 0)
@example(2, set(), 0)
@settings(deadline=None)
def test_a_patch_makes_the_new_version_of_the_old_one(unit: int, places: set[int], seed: int) -> None:
    old, new = changed_at(5000 * 8 // unit, unit, sorted(places), seed)
    patch = make_patch(old, new, base=3, unit=unit)
    if patch is None:
        assert len(places) * (unit + 1) > 0.8 * new.numel()
        return
    assert (patch.changed, patch.entries) == (len(places), new.numel() // unit)
    assert patch.payload.numel() == patch.layout.nbytes <= len(places) * (unit + 2) + 64
    patch.layout.apply(patch.payload, old)
    assert torch.equal(old, new)


@pytest.mark.parametrize(("gap", "rate"), [(1, 0.02), (2, 0.001)])
def test_gaps_take_the_fewest_bytes_and_are_bridged_where_they_are_too_wide(gap: int, rate: float) -> None:
    entries = 400_000
    places = np.flatnonzero(np.random.default_rng(0).random(entries) < rate).tolist()
    old, new = changed_at(entries, 2, [*places, entries - 1], 0)
    patch = make_patch(old, new, base=0, unit=2)
    assert patch is not None
    assert [piece.gap for piece in patch.layout.pieces] == [gap]
    assert patch.payload.numel() < 1.1 * len(places) * (2 + gap) + 64
    patch.layout.apply(patch.payload, old)
    assert torch.equal(old, new)


def test_blocks_are_coded_each_for_itself() -> None:
    old = torch.zeros(3 * BLOCK_BYTES, dtype=torch.uint8)
    new = old.clone()
    new[:BLOCK_BYTES] = torch.randint(1, 256, [BLOCK_BYTES], dtype=torch.uint8)
    new[-1] = 1
    patch = make_patch(old, new, base=0, unit=2)
    assert patch is not None
    assert [piece.gap for piece in patch.layout.pieces] == [0, 1, 2]
    assert patch.payload.numel() < BLOCK_BYTES + 256
    patch.layout.apply(patch.payload, old)
    assert torch.equal(old, new)


def test_what_changed_almost_everywhere_is_not_worth_a_patch() -> None:
    old = torch.zeros(1000, dtype=torch.uint8)
    assert make_patch(old, old + 1, base=0, unit=1) is None


def test_signed_zeros_and_nans_are_compared_as_bits() -> None:
    old = torch.tensor([0.0, float("nan"), 1.0, 2.0] * 16)
    new = old.clone()
    new[0] = -0.0
    patch = make_patch(old.view(torch.uint8), new.view(torch.uint8), base=0, unit=4)
    assert patch is not None
    assert patch.changed == 1


def test_a_patch_that_does_not_fit_is_refused() -> None:
    flat = torch.zeros(16, dtype=torch.uint8)
    far = PatchLayout(0, 2, 8, [Piece(1, 2)])
    payload = torch.zeros(far.nbytes, dtype=torch.uint8)
    payload[8:10] = 4
    with pytest.raises(ValueError, match=r"block 0: got an entry at 9, expected fewer than 8"):
        far.apply(payload, flat)
    with pytest.raises(ValueError, match=r"got 1 blocks, expected 2"):
        PatchLayout(0, 2, 4, [Piece(1, 0)]).apply(payload, flat)
    with pytest.raises(ValueError, match=r"block 0: got 3 entries, expected 8"):
        PatchLayout(0, 2, 8, [Piece(0, 3)]).apply(payload, flat)
    with pytest.raises(ValueError, match="expected a gap of 0, 1 or 2"):
        PatchLayout(0, 2, 8, [Piece(3, 1)])
    with pytest.raises(ValueError, match="entries of 3 bytes"):
        PatchLayout(0, 3, 8, [])


# --- on their way --------------------------------------------------------------------------------------------------


def test_patches_are_for_those_who_hold_their_base_and_had_no_trouble() -> None:
    roster = Roster(peer_timeout_s=10.0, grace_s=2.0)
    for number, (name, version, failures) in enumerate([("a", 1, 0), ("late", 0, 0), ("new", None, 0), ("bad", 1, 1)]):
        roster.join(Member(number, name, version, heard=0.0, served=True, failures=failures))
    roster.offer(2, 0.0, base=1)
    for member in roster.members.values():
        member.ready, member.asked_at = True, float("inf")
    assert [member.name for member in roster.party(2, 0.0)] == ["a"]
    roster.members.pop(0)
    assert [member.name for member in roster.party(2, 0.0)] == ["late", "new", "bad"]


def test_a_patch_is_made_in_place_and_in_a_copy_where_the_owner_still_holds_its_base() -> None:
    shelf = Shelf(torch.device("cpu"))
    first = shelf.claim(64).fill_(1)
    shelf.put(1, {}, hash="", flat=first)
    assert not shelf.holds(0)
    assert shelf.claim_filled(1) is first  # waited there unseen, and is withdrawn
    assert (shelf.take(), shelf.claim_filled(1)) == (None, None)
    shelf.put(2, {}, hash="", flat=first)
    held = shelf.take()
    assert held is not None
    copy = shelf.claim_filled(2)
    assert copy is not None
    assert copy is not first
    assert torch.equal(copy, first)
    shelf.put(3, {}, hash="", flat=copy)
    held.release()
    assert shelf.claim(64) is first  # the free one, so that version 3 stays to be patched
    assert shelf.holds(3)
    assert shelf.claim_filled(3) is copy
    assert not shelf.holds(3)


def weights(version: int) -> dict[str, Tensor]:
    """Each version changes one entry of the one before."""
    tensors = {"a": torch.arange(1 << 20).to(torch.bfloat16), "b": torch.zeros(300, 7, dtype=torch.bfloat16)}
    tensors["a"][: 3 * version : 3] = -1.0
    return tensors


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=10.0, sparse=True)) as publisher:
        yield publisher


def take(subscriber: Subscriber, version: int) -> None:
    with subscriber.wait(20.0) as update:
        assert update.version == version
        assert all(equal_bits(tensor, update.tensors[name]) for name, tensor in weights(version).items())


def test_only_what_changed_is_sent_to_those_who_hold_the_version_before(publisher: Publisher) -> None:
    publisher.publish(0, weights(0))
    with Subscriber(*publisher.address, name="a", timeout_s=10.0) as subscriber:
        take(subscriber, 0)
        publisher.wait(20.0)
        whole = publisher.counters["bytes"]
        for version in (1, 2, 3):
            publisher.publish(version, weights(version))
            take(subscriber, version)
            publisher.wait(20.0)
        assert publisher.counters["patches"] == 3
        assert publisher.counters["bytes"] < whole + 3 * 256
        entries = sum(tensor.numel() for tensor in weights(0).values())
        assert publisher.counters["changed"] == pytest.approx(1 / entries, rel=1e-3)
        with Subscriber(*publisher.address, name="late", timeout_s=10.0) as late:
            take(late, 3)
            publisher.publish(4, weights(4))
            take(late, 4)
            take(subscriber, 4)


def test_an_update_that_is_held_stays_as_it_is_while_later_ones_are_patched(publisher: Publisher) -> None:
    publisher.publish(0, weights(0))
    with Subscriber(*publisher.address, name="a", timeout_s=10.0) as subscriber:
        with subscriber.wait(20.0) as held:
            for version in (1, 2, 3):
                publisher.publish(version, weights(version))
                publisher.wait(20.0)
            assert all(equal_bits(tensor, held.tensors[name]) for name, tensor in weights(0).items())
        take(subscriber, 3)
    assert publisher.counters["patches"] == 3


def test_another_layout_or_a_change_of_everything_is_sent_whole(publisher: Publisher) -> None:
    with Subscriber(*publisher.address, name="a", timeout_s=10.0) as subscriber:
        for version, tensors in enumerate([weights(0), {"x": torch.ones(99)}, {"x": torch.zeros(99)}]):
            publisher.publish(version, tensors)
            with subscriber.wait(20.0) as update:
                assert {name: tensor.tolist() for name, tensor in update.tensors.items()} == {
                    name: tensor.tolist() for name, tensor in tensors.items()
                }
            publisher.wait(20.0)
    assert (publisher.counters["patches"], publisher.counters["changed"]) == (0, 1.0)


@pytest.mark.parametrize("byte", [0, 8], ids=["a value", "a gap"])
def test_a_patch_that_was_corrupted_is_refused_and_all_is_fetched_anew(publisher: Publisher, byte: int) -> None:
    def corrupt(number: int, bucket: Tensor) -> None:
        if bucket.numel() < 1000:  # a patch
            bucket[byte] ^= 255

    def connect(store: Store, seat: Seat) -> Transport:
        return FaultyTransport(store, seat, corrupt) if seat.epoch == 1 else GlooTransport(store, seat)

    publisher.publish(0, weights(0))
    with Subscriber(*publisher.address, name="a", timeout_s=10.0, connect=connect) as subscriber:
        take(subscriber, 0)
        publisher.wait(20.0)
        publisher.publish(1, weights(1))
        take(subscriber, 1)
        publisher.wait(20.0)
        assert publisher.counters["refused_updates"] + publisher.counters["failed_updates"] == 1
        assert publisher.counters["patches"] == 1
        publisher.publish(2, weights(2))
        take(subscriber, 2)
        publisher.wait(20.0)
        assert publisher.counters["patches"] == 2
