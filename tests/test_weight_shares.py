"""Weights that several ranks keep and send in shares: the same bits, no rank with all of them, and nobody stuck when a rank fails."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.distributed import Store
from weights_members import all_verified, eventually, peers
from weights_peer import FaultyTransport, equal_bits, weights

from engine.gathered import Gathered
from engine.weights import (
    GlooTransport,
    Keeper,
    Publisher,
    Seat,
    Subscriber,
    Terms,
    Transport,
    fingerprints,
    weights_hash,
)
from engine.weights.layout import share_out
from engine.weights.transport import Connect, TransportError, connect

TIMEOUT_S = 3.0
LOCAL = "127.0.0.1"


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.integers(0, 5000), min_size=1), st.integers(1, 9))
@settings(deadline=None)
def test_every_tensor_is_in_one_share_and_the_shares_are_about_equal(sizes: dict[str, int], count: int) -> None:
    tensors = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    shares = share_out(tensors, count)
    assert len(shares) == min(count, len(tensors))
    names = [entry.name for share in shares for entry in share.entries]
    assert sorted(names) == sorted(tensors)
    held = [sum(sizes[entry.name] for entry in share.entries) for share in shares]
    assert max(held) - min(held) <= max(1, *sizes.values()) + count  # as good as any tensor allows that was put last
    assert share_out(dict(reversed(tensors.items())), count) == shares


class Ranks:
    """A learner's ranks, each as its own process would be: the first with the publisher, the others with keepers."""

    def __init__(self, stack: ExitStack, terms: Terms, *, token: str = "", connect: Connect = connect) -> None:
        self.publisher = stack.enter_context(Publisher(LOCAL, terms, token=token, connect=connect))
        self.keepers = [
            stack.enter_context(Keeper(*self.publisher.address, rank=rank, terms=terms, token=token, connect=connect))
            for rank in range(1, terms.ranks)
        ]

    def publish(self, version: int, tensors: dict[str, Tensor] | Gathered, *, given: bool = False) -> None:
        """All ranks at the same time."""
        prints = fingerprints(tensors) if given and isinstance(tensors, dict) else None
        threads = [
            threading.Thread(target=keeper.keep, args=(version, tensors), kwargs={"fingerprints": prints})
            for keeper in self.keepers
        ]
        for thread in threads:
            thread.start()
        self.publisher.publish(version, tensors, fingerprints=prints)
        for thread in threads:
            thread.join(20.0)
            assert not thread.is_alive()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def terms(ranks: int, *, sparse: bool = False) -> Terms:
    return Terms(bucket_bytes=1 << 20, peer_timeout_s=TIMEOUT_S, ranks=ranks, sparse=sparse)


@contextmanager
def member(ranks: Ranks, name: str, *, token: str = "", connect: Connect = connect) -> Iterator[Subscriber]:
    with Subscriber(
        *ranks.publisher.address, name=name, timeout_s=TIMEOUT_S, token=token, connect=connect
    ) as subscriber:
        yield subscriber


def take(subscriber: Subscriber, version: int, tensors: dict[str, Tensor]) -> None:
    with subscriber.wait(30.0) as update:
        assert update.version == version
        assert sorted(update.tensors) == sorted(tensors)
        assert all(equal_bits(tensor, update.tensors[name]) for name, tensor in tensors.items())
        assert update.hash == weights_hash(fingerprints(tensors))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("given", [False, True], ids=["hashed on the way", "hashed before"])
def test_bits_arrive_from_all_ranks_and_each_keeps_its_share_alone(stack: ExitStack, ranks: int, given: bool) -> None:
    learner = Ranks(stack, terms(ranks))
    first, second = stack.enter_context(member(learner, "a")), stack.enter_context(member(learner, "b"))
    for version in range(4):
        learner.publish(version, weights(version), given=given)
        take(first, version, weights(version))
        take(second, version, weights(version))
        learner.publisher.wait(10.0)
    late = stack.enter_context(member(learner, "late"))
    take(late, 3, weights(3))
    learner.publish(4, weights(4))
    for subscriber in (first, second, late):
        take(subscriber, 4, weights(4))
    whole = sum(tensor.nbytes for tensor in weights(4).values())
    kept = [learner.publisher.nbytes, *(keeper.nbytes for keeper in learner.keepers)]
    assert max(kept) < 1.1 * whole / ranks
    assert sum(kept) < 1.01 * whole
    assert learner.publisher.counters["failed_updates"] == learner.publisher.counters["dropped"] == 0
    assert learner.publisher.counters["bytes"] == pytest.approx(
        whole * learner.publisher.counters["broadcasts"], rel=0.01
    )


def test_each_rank_sends_what_changed_in_its_share(stack: ExitStack) -> None:
    learner = Ranks(stack, terms(2, sparse=True))
    subscriber = stack.enter_context(member(learner, "a"))

    def tensors(version: int) -> dict[str, Tensor]:
        found = {"a": torch.arange(1 << 20).to(torch.bfloat16), "b": torch.zeros(1 << 20, dtype=torch.bfloat16)}
        found["a"][: 3 * version : 3] = -1.0
        found["b"][: 5 * version : 5] = 2.0
        return found

    for version in range(4):
        learner.publish(version, tensors(version))
        take(subscriber, version, tensors(version))
        learner.publisher.wait(10.0)
    counters = learner.publisher.counters
    assert counters["patches"] == 3
    assert counters["bytes"] < sum(tensor.nbytes for tensor in tensors(0).values()) + 3 * 512
    assert counters["changed"] == pytest.approx(2 / (2 << 20), rel=1e-3)
    changed = {"a": tensors(3)["a"], "b": torch.randn(1 << 20).to(torch.bfloat16)}  # a share that no patch is worth
    learner.publish(4, changed)
    take(subscriber, 4, changed)
    learner.publisher.wait(10.0)
    assert learner.publisher.counters["patches"] == 3


def test_fewer_tensors_than_ranks_and_another_layout(stack: ExitStack) -> None:
    learner = Ranks(stack, terms(3))
    subscriber = stack.enter_context(member(learner, "a"))
    one, three = {"x": torch.ones(5)}, {"x": torch.ones(900), "y": torch.zeros(2), "z": torch.arange(4)}
    for version, tensors in enumerate([one, three, one]):
        learner.publish(version, tensors)
        take(subscriber, version, tensors)


def test_ranks_that_hold_parts_go_through_all_tensors_together(stack: ExitStack) -> None:
    """As DeepSpeed's third stage: a tensor is whole on every rank for a moment, once all of them have asked for it."""
    learner, meeting, found = Ranks(stack, terms(3)), threading.Barrier(3, timeout=20.0), weights(0)

    def items() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in found.items():
            meeting.wait()
            yield name, tensor.clone()

    subscriber = stack.enter_context(member(learner, "a"))
    learner.publish(0, Gathered(found, items, parts=True))
    take(subscriber, 0, found)
    assert learner.keepers[1].nbytes > 0


def test_behind_a_token(stack: ExitStack) -> None:
    learner = Ranks(stack, terms(2), token="t" * 64)
    subscriber = stack.enter_context(member(learner, "a", token="t" * 64))
    learner.publish(0, weights(0))
    take(subscriber, 0, weights(0))
    with pytest.raises(ConnectionError, match="refused the token"):
        Keeper(*learner.publisher.address, rank=1, terms=terms(2), token="wrong")


def corrupt_share(share: int, fault: Callable[[int, Tensor], None]) -> Connect:
    """A member's transports, with a fault in the first group of one share."""

    def connect(store: Store, seat: Seat) -> Transport:
        faulty = seat.share == share and seat.epoch == 1
        return FaultyTransport(store, seat, fault) if faulty else GlooTransport(store, seat)

    return connect


@pytest.mark.parametrize("share", [0, 1])
def test_corruption_of_any_share_is_caught_and_all_is_fetched_anew(stack: ExitStack, share: int) -> None:
    def flip(number: int, bucket: Tensor) -> None:
        if number == 2:
            bucket[5] ^= 1

    learner = Ranks(stack, terms(2))
    damaged = stack.enter_context(member(learner, "damaged", connect=corrupt_share(share, flip)))
    sound = stack.enter_context(member(learner, "sound"))
    learner.publish(0, weights(0))
    take(damaged, 0, weights(0))
    take(sound, 0, weights(0))
    assert (damaged.counters["refused"], sound.counters["refused"]) == (1, 0)
    assert learner.publisher.counters["refused_updates"] == 1


class Unwilling:
    """A rank's transports, of which the first that it builds as the sender of `share` fails in its second bucket."""

    def __init__(self, share: int) -> None:
        self._share, self._left = share, 1

    def __call__(self, store: Store, seat: Seat) -> Transport:
        def fail(number: int, bucket: Tensor) -> None:
            if number == 1:
                raise TransportError("the wire is cut")

        if seat.rank == 0 and seat.share == self._share and self._left:
            self._left -= 1
            return FaultyTransport(store, seat, fail)
        return GlooTransport(store, seat)


@pytest.mark.parametrize("share", [0, 1])
def test_a_rank_that_cannot_send_costs_the_members_one_attempt(stack: ExitStack, share: int) -> None:
    learner = Ranks(stack, terms(2), connect=Unwilling(share))
    found = [stack.enter_context(member(learner, name)) for name in ("a", "b")]
    learner.publish(0, weights(0))
    for subscriber in found:
        take(subscriber, 0, weights(0))
    assert learner.publisher.counters["failed_updates"] >= 1
    learner.publish(1, weights(1))
    for subscriber in found:
        take(subscriber, 1, weights(1))


def test_members_that_die_or_stall_amid_the_shares_are_dropped_and_the_others_go_on(stack: ExitStack) -> None:
    learner = Ranks(stack, terms(2))
    faults = {"dies": "die", "stalls": "stall"}
    found = stack.enter_context(peers(learner.publisher, "a", *faults, "b", faults=faults))
    for version in range(3):
        learner.publish(version, weights(version))
        for peer in (found[0], found[3]):
            peer.version(version, 30.0)
    eventually("both are dropped", lambda: set(learner.publisher.members) == {"a", "b"})
    found[2].process.send_signal(signal.SIGCONT)
    found[2].version(2, 30.0)
    assert all_verified([found[0], found[2], found[3]])


def test_a_keeper_says_what_it_waits_for(stack: ExitStack) -> None:
    publisher = stack.enter_context(Publisher(LOCAL, terms(2)))
    keeper = stack.enter_context(Keeper(*publisher.address, rank=1, terms=terms(2), publish_s=0.5))
    with pytest.raises(TimeoutError, match=r"learner rank 1 waited 0\.5 s for the first rank to publish version 7"):
        keeper.keep(7, {"x": torch.ones(5), "y": torch.ones(5)})
    publisher.close()
    with pytest.raises(ConnectionError, match="the first rank's store is lost"):
        keeper.keep(8, {"x": torch.ones(5), "y": torch.ones(5)})


def test_terms_are_checked() -> None:
    with pytest.raises(ValueError, match="got ranks 0, expected more than 0"):
        Terms(ranks=0)
    with pytest.raises(ValueError, match="got bucket_bytes 0, expected more than 0"):
        Terms(bucket_bytes=0)
