"""The weight flow: fingerprints, who is served when, and real processes that come, stall, die and return."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.distributed import Store
from weights_members import SCRIPT, START_S, Peer, all_verified, eventually, peers
from weights_peer import BUCKET_BYTES, TIMEOUT_S, equal_bits, weights

from engine.weights import Publisher, Seat, Subscriber, Terms, Transport, fingerprints, weights_hash
from engine.weights.control import open_store
from engine.weights.layout import ALIGNMENT, Digests, Entry, Layout, layout_of
from engine.weights.messages import Done, Failed, Ready
from engine.weights.roster import ALONE_AFTER, DROP_AFTER, Member, Roster
from engine.weights.transport import connect as build
from engine.weights.update import Shelf

tensors_strategy = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4),
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
        st.lists(st.integers(0, 9), max_size=3),
    ),
    min_size=1,
    max_size=6,
)


def filled(shapes: dict[str, tuple[torch.dtype, list[int]]]) -> dict[str, torch.Tensor]:
    return {
        name: (torch.arange(torch.Size(shape).numel()) % 251 + index).reshape(shape).to(dtype)
        for index, (name, (dtype, shape)) in enumerate(shapes.items())
    }


# --- layout and fingerprints ---------------------------------------------------------------------------------------


@given(tensors_strategy, st.integers(1, 300))
@settings(deadline=None)
def test_digests_of_pieces_are_the_fingerprints_of_the_whole(
    shapes: dict[str, tuple[torch.dtype, list[int]]], piece: int
) -> None:
    tensors = filled(shapes)
    layout = layout_of(tensors)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, view in layout.views(flat).items():
        view.copy_(tensors[name])
    digests = Digests(layout)
    for part in flat.split(piece):
        digests.feed(part)
    names = [entry.name for entry in layout.entries]
    assert dict(zip(names, digests.result(), strict=True)) == fingerprints(tensors)
    assert all(equal_bits(tensors[name], view) for name, view in layout.views(flat).items())


def test_a_fingerprint_covers_dtype_shape_and_bytes() -> None:
    zeros = torch.zeros(2, 3)
    variants = [zeros, zeros.T, zeros.to(torch.int32), -zeros, torch.tensor([[0, 0, 0], [0, 0, 1e-45]])]
    assert len({fingerprints({"x": tensor})["x"] for tensor in variants}) == len(variants)
    strided = torch.arange(12.0).reshape(3, 4).T
    assert fingerprints({"x": strided}) == fingerprints({"x": strided.contiguous()})


def test_the_hash_covers_names_and_ignores_order() -> None:
    one, two = fingerprints(filled({"a": (torch.int64, [3]), "b": (torch.bool, [1])})).items()
    assert weights_hash(dict([one, two])) == weights_hash(dict([two, one]))
    assert weights_hash({"a": one[1], "b": two[1]}) != weights_hash({"a": two[1], "b": one[1]})


def test_a_layout_that_overlaps_or_is_of_no_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"b: starts at byte 64, expected 68 or later"):
        Layout([Entry("a", "float32", (17,), 0), Entry("b", "float32", (1,), ALIGNMENT)])
    with pytest.raises(ValueError, match="got dtype 'nn'"):
        Entry("a", "nn", (1,), 0)
    with pytest.raises(ValueError, match="no tensor"):
        layout_of({})


# --- who is served when --------------------------------------------------------------------------------------------


def roster_of(*names: str, version: int | None = None) -> Roster:
    roster = Roster(peer_timeout_s=10.0, grace_s=2.0)
    for number, name in enumerate(names, 1):
        roster.join(Member(number, name, version, heard=0.0, served=version is not None))
    return roster


def answer(roster: Roster, number: int, now: float, kind: Callable[..., Any] = Ready) -> None:
    extra = {Ready: [1], Failed: ["broke"], Done: []}[kind]
    roster.hear(kind(number, roster.members[number].offer, *extra), now)


def test_those_who_are_ready_wait_for_the_others_only_so_long() -> None:
    roster = roster_of("a", "b", version=0)
    assert len(roster.offer(1, 0.0)) == 2
    answer(roster, 1, 0.1)
    assert roster.party(1, 0.2) == []
    assert roster.party(1, 2.1) == [roster.members[1]]
    answer(roster, 2, 2.2)
    assert roster.party(1, 2.3) == [roster.members[1], roster.members[2]]


def test_a_newcomer_is_served_at_once_and_apart_from_the_others() -> None:
    roster = roster_of("a", version=1)
    roster.join(Member(2, "new", None, heard=0.0))
    assert roster.offer(1, 0.0) == [roster.members[2]]
    answer(roster, 2, 0.0)
    assert roster.party(1, 0.0) == [roster.members[2]]
    roster.offer(2, 0.0)  # the next version comes before it was served: the others go first
    answer(roster, 1, 0.0)
    answer(roster, 2, 0.0)
    assert roster.party(2, 0.0) == [roster.members[1]]


def test_a_verdict_is_awaited_before_the_next_offer() -> None:
    roster = roster_of("a", version=0)
    roster.offer(1, 0.0)
    answer(roster, 1, 0.0)
    roster.sent(roster.party(1, 0.0), 0.0)
    assert roster.offer(2, 0.1) == []
    answer(roster, 1, 0.2, Done)
    assert roster.members[1].version == 1
    assert roster.offer(2, 0.2) == [roster.members[1]]


def test_void_answers_are_ignored() -> None:
    roster = roster_of("a", version=0)
    roster.offer(1, 0.0)
    old = roster.members[1].offer
    roster.fail(roster.members[1], 0.0)
    roster.offer(1, 1.0)
    assert roster.hear(Ready(1, old, 1), 1.0) is None
    assert roster.hear(Ready(9, 1, 1), 1.0) is None
    assert not roster.members[1].ready


def test_who_is_silent_or_owes_an_answer_is_overdue() -> None:
    roster = roster_of("silent", "owing", "well", version=0)
    roster.offer(1, 1.0)
    answer(roster, 3, 9.0)
    roster.members[2].heard = 9.0
    assert roster.overdue(10.0) == []
    assert [member.name for member, _ in roster.overdue(11.5)] == ["silent", "owing"]


def test_nccl_is_for_those_on_cards_of_their_own_and_gloo_for_all_others() -> None:
    roster = roster_of("own", "learner's", "host", "own too", "second on own", version=0)
    for member, card in zip(roster.members.values(), ["one", "zero", "", "two", "one"], strict=True):
        member.card = card
    roster.offer(1, 0.0, cards=["zero"])
    for number in roster.members:
        answer(roster, number, 0.0)
    first = roster.party(1, 0.0)
    assert [member.name for member in first] == ["own", "own too"]
    assert all(member.nccl for member in first)
    roster.sent(first, 0.0)
    for number in (1, 4):
        answer(roster, number, 0.0, Done)
    assert [member.name for member in roster.party(1, 0.0)] == ["learner's", "host", "second on own"]


def test_a_learner_without_a_card_and_a_member_that_had_trouble_use_gloo() -> None:
    roster = roster_of("on a card", version=0)
    member = roster.members[1]
    member.card = "one"
    roster.offer(1, 0.0)
    assert not member.nccl
    for failures in range(ALONE_AFTER + 1):
        roster.fail(member, 0.0)
        roster.offer(1, member.retry_at, cards=["zero"])
        assert member.nccl == (failures + 1 < ALONE_AFTER)


def test_failures_are_retried_later_each_time_then_alone_then_dropped() -> None:
    roster, now, pauses = roster_of("bad", "good", version=0), 0.0, []
    for failure in range(1, DROP_AFTER + 1):
        roster.offer(1, now)
        for number in (1, 2):
            answer(roster, number, now)
        names = [member.name for member in roster.party(1, now)]
        assert ("good" in names and "bad" in names) == (failure <= ALONE_AFTER)
        answer(roster, 1, now, Failed)
        pauses.append(roster.members[1].retry_at - now)
        assert roster.offer(1, now) == []
        now = roster.members[1].retry_at
    assert pauses == sorted(pauses)
    assert [(m.name, why) for m, why in roster.overdue(now)] == [("bad", f"failed {DROP_AFTER} times")]


# --- two buffers ---------------------------------------------------------------------------------------------------


def test_what_is_out_is_never_received_into_and_only_the_newest_is_handed_out() -> None:
    shelf = Shelf(torch.device("cpu"))

    def arrive(version: int) -> None:
        flat = shelf.claim(64)
        flat.fill_(version)
        shelf.put(version, {"x": flat}, hash="", flat=flat)

    arrive(1)
    arrive(2)
    first = shelf.take()
    assert first is not None
    assert (first.version, shelf.take(), shelf.version) == (2, None, 2)
    for version in range(3, 7):
        arrive(version)
        assert bool((first.tensors["x"] == 2).all())
    with pytest.raises(RuntimeError, match=r"version 2 is still held; release it before taking 6"):
        shelf.take()
    first.release()
    with shelf.take() as second:  # type: ignore[union-attr]
        assert (second.version, int(second.tensors["x"][0])) == (6, 6)


def test_a_withdrawn_update_does_not_count_as_held() -> None:
    shelf = Shelf(torch.device("cpu"))
    flat = shelf.claim(64)
    shelf.put(1, {}, hash="", flat=flat)
    taken = shelf.take()
    shelf.put(2, {}, hash="", flat=shelf.claim(64))
    assert shelf.version == 2
    shelf.claim(64)
    assert (shelf.version, shelf.take()) == (1, None)
    assert taken is not None


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with Publisher("127.0.0.1", Terms(bucket_bytes=BUCKET_BYTES, peer_timeout_s=TIMEOUT_S)) as publisher:
        yield publisher


def test_bits_arrive_a_joiner_is_current_at_once_and_the_store_does_not_grow(publisher: Publisher) -> None:
    with peers(publisher, "a", "b") as (a, b):
        publisher.publish(0, weights(0))
        a.version(0), b.version(0)
        publisher.publish(3, weights(3), fingerprints=fingerprints(weights(3)))
        a.version(3), b.version(3)
        with peers(publisher, "late") as (late,):
            late.version(3)  # nothing was published since it joined
            publisher.publish(4, weights(4))
            reports = [peer.version(4) for peer in (a, b, late)]
            assert [report["joins"] for report in reports] == [1, 1, 1]
            groups = publisher.counters["groups"]
            store = open_store(*publisher.address, 5.0)
            keys = store.num_keys()
            for version in range(5, 10):
                publisher.publish(version, weights(version))
                publisher.wait(10.0)
            a.version(9), b.version(9), late.version(9)
            assert publisher.counters["groups"] == groups
            eventually("no more keys than before", lambda: store.num_keys() <= keys)
            late.leave()
            eventually("the leaver is no member", lambda: set(publisher.members) == {"a", "b"})
        assert all_verified([a, b, late])
        assert publisher.counters["dropped"] == publisher.counters["refused_updates"] == 0


def test_a_killed_subscriber_is_dropped_and_the_others_go_on(publisher: Publisher) -> None:
    with peers(publisher, "a", "idle-killed", "b", "killed-amid", faults={"killed-amid": "die"}) as (a, idle, b, _):
        publisher.publish(0, weights(0))
        a.version(0), b.version(0), idle.version(0)
        idle.process.send_signal(signal.SIGKILL)
        publisher.publish(1, weights(1))
        a.version(1), b.version(1)
        eventually("both are dropped", lambda: set(publisher.members) == {"a", "b"})
        publisher.publish(2, weights(2))
        a.version(2), b.version(2)
        publisher.wait(10.0)
        assert publisher.counters["dropped"] >= 2
        assert all_verified([a, b, idle])


def test_a_stalled_subscriber_is_dropped_at_the_timeout_and_returns(publisher: Publisher) -> None:
    with peers(publisher, "a", "b", "stalls", faults={"stalls": "stall"}) as (a, b, stalls):
        publisher.publish(0, weights(0))
        began = time.monotonic()
        a.version(0), b.version(0)
        assert time.monotonic() - began < 3 * TIMEOUT_S + 5.0
        eventually("it is dropped", lambda: set(publisher.members) == {"a", "b"})
        publisher.publish(1, weights(1))
        a.version(1), b.version(1)
        stalls.process.send_signal(signal.SIGCONT)
        report = stalls.version(1)
        assert report["joins"] >= 2
        publisher.publish(2, weights(2))
        for peer in (a, b, stalls):
            peer.version(2)
        assert all_verified([a, b, stalls])


def test_a_subscriber_stopped_while_idle_holds_the_others_up_for_the_grace_only(publisher: Publisher) -> None:
    with peers(publisher, "a", "stopped") as (a, stopped):
        publisher.publish(0, weights(0))
        a.version(0), stopped.version(0)
        stopped.process.send_signal(signal.SIGSTOP)
        publisher.publish(1, weights(1))
        a.version(1, timeout_s=10.0)
        eventually("it is dropped", lambda: set(publisher.members) == {"a"})
        stopped.process.send_signal(signal.SIGCONT)
        assert stopped.version(1)["joins"] >= 2


def test_corruption_on_the_way_is_caught_and_the_update_fetched_anew(publisher: Publisher) -> None:
    faults = {"flip": "flip", "swap": "swap", "skip": "skip"}
    with peers(publisher, *faults, "sound", faults=faults) as found:
        publisher.publish(0, weights(0))
        for peer in found[:3]:
            assert peer.version(0)["refused"] == 1
        assert found[3].version(0)["refused"] == 0
        assert publisher.counters["refused_updates"] == 3
        assert all_verified(found)


@pytest.mark.parametrize(("signal_", "says"), [(signal.SIGKILL, "onnection"), (signal.SIGSTOP, "not answered for")])
def test_subscribers_notice_that_the_learner_is_gone(signal_: signal.Signals, says: str) -> None:
    with ExitStack() as stack:
        learner = Peer("publish")
        stack.callback(learner.end)
        port = learner.expect("port", lambda report: "port" in report, START_S)["port"]
        found = [Peer("subscribe", str(port), name) for name in ("a", "b")]
        for peer in found:
            stack.callback(peer.end)
        for peer in found:
            peer.version(0, START_S)
        learner.process.send_signal(signal_)
        began = time.time()
        for peer in found:
            lost = peer.expect("loss", lambda report: report.get("alive") is False)
            assert says in lost["error"]
            assert lost["at"] - began < TIMEOUT_S + 3.0


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_that_closes_nothing_still_ends_with_its_own_exit_code(code: int) -> None:
    script = f"""
import torch
from engine.weights import Publisher, Subscriber, Terms
publisher = Publisher("127.0.0.1", Terms(peer_timeout_s=10))
publisher.publish(0, {{"x": torch.ones(9)}})
subscriber = Subscriber(*publisher.address, name="a", timeout_s=10)
subscriber.wait(20)
raise SystemExit({code})
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=SCRIPT.parent.parent, timeout=START_S)
    assert ended.returncode == code


# --- one process ---------------------------------------------------------------------------------------------------


def test_what_is_held_stays_and_the_newest_follows(publisher: Publisher) -> None:
    publisher.publish(0, weights(0))  # no members yet: kept for those who come
    with Subscriber(*publisher.address, name="a", timeout_s=TIMEOUT_S) as subscriber:
        with subscriber.wait(20.0) as held:
            for version in (1, 2, 3):
                publisher.publish(version, weights(version))
                publisher.wait(20.0)
            assert all(equal_bits(tensor, held.tensors[name]) for name, tensor in weights(0).items())
        with subscriber.wait(20.0) as update:
            assert update.version == 3
        assert subscriber.poll() is None
        with pytest.raises(TimeoutError, match=r"no update within 0\.1 s"):
            subscriber.wait(0.1)
    assert (subscriber.alive, publisher.counters["bytes"] > 0) == (False, True)


def test_another_layout_may_follow(publisher: Publisher) -> None:
    with Subscriber(*publisher.address, name="a", timeout_s=TIMEOUT_S) as subscriber:
        for version, tensors in enumerate([{"x": torch.ones(5)}, {"x": torch.ones(900), "y": torch.zeros(2)}]):
            publisher.publish(version, tensors)
            with subscriber.wait(20.0) as update:
                assert {name: list(tensor.shape) for name, tensor in update.tensors.items()} == {
                    name: list(tensor.shape) for name, tensor in tensors.items()
                }


def test_wrong_use_is_refused(publisher: Publisher) -> None:
    publisher.publish(1, {"x": torch.ones(5)})
    with pytest.raises(ValueError, match=r"got version 1, expected more than 1"):
        publisher.publish(1, {"x": torch.ones(5)})
    with pytest.raises(ValueError, match=r"differ in names, \['x', 'y'\]"):
        publisher.publish(2, {"x": torch.ones(5)}, fingerprints={"y": ""})
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1: no answer within 0\.2 s"):
        Subscriber("127.0.0.1", 1, name="a", timeout_s=0.2)
    with pytest.raises(OSError, match="cannot listen on"):
        Publisher("127.0.0.1", Terms(), port=publisher.address[1])
    publisher.close()
    with pytest.raises(RuntimeError, match="thread has ended"):
        publisher.publish(2, {"x": torch.ones(5)})


# --- GPUs ------------------------------------------------------------------------------------------------------------


def needs_cards(count: int) -> pytest.MarkDecorator:
    reason = f"needs {count} NVIDIA GPU(s) and a CUDA build of PyTorch"
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)


@pytest.mark.parametrize("cards", [pytest.param(count, marks=needs_cards(count)) for count in (1, 2)])
def test_weights_from_card_to_card(cards: int) -> None:
    """Over NCCL between two of them, by way of the host's memory where both ends share one."""
    seats: list[Seat] = []

    def connect(store: Store, seat: Seat) -> Transport:
        seats.append(seat)
        return build(store, seat)

    receiving = f"cuda:{cards - 1}"
    with (
        Publisher("127.0.0.1", Terms(device="cuda:0", bucket_bytes=BUCKET_BYTES, peer_timeout_s=30.0)) as publisher,
        Subscriber(*publisher.address, name="a", device=receiving, timeout_s=30.0, connect=connect) as subscriber,
    ):
        for version in range(3):
            publisher.publish(version, {name: tensor.to("cuda:0") for name, tensor in weights(version).items()})
            with subscriber.wait(60.0) as update:
                assert {str(tensor.device) for tensor in update.tensors.values()} == {receiving}
                assert all(equal_bits(tensor, update.tensors[name].cpu()) for name, tensor in weights(version).items())
    assert {seat.device.type for seat in seats} == {"cuda" if cards > 1 else "cpu"}


@needs_cards(1)
def test_a_learner_on_a_card_serves_a_member_that_reads_the_hosts_memory() -> None:
    with (
        Publisher("127.0.0.1", Terms(device="cuda", bucket_bytes=BUCKET_BYTES, peer_timeout_s=30.0)) as publisher,
        Subscriber(*publisher.address, name="a", timeout_s=30.0) as subscriber,
    ):
        publisher.publish(0, {name: tensor.cuda() for name, tensor in weights(0).items()})
        with subscriber.wait(60.0) as update:
            assert all(equal_bits(tensor, update.tensors[name]) for name, tensor in weights(0).items())
