"""A generator finds the learner that is announced last, whatever became of the one before."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.weights import Publisher, Terms
from protocols.link_messages import Announce
from workers.weight_feed import LearnerLost, WeightFeed


@pytest.fixture
def learner() -> Iterator[Publisher]:
    publisher = Publisher("127.0.0.1", Terms(bucket_bytes=1 << 20, peer_timeout_s=10.0))
    publisher.publish(7, {"weight": torch.arange(6.0)})
    yield publisher
    publisher.close()


@pytest.fixture
def feed() -> Iterator[WeightFeed]:
    feed = WeightFeed("g", device="cpu", peer_timeout_s=30.0, learner_timeout_s=20.0)
    yield feed
    feed.close()


@contextmanager
def nobody() -> Iterator[Announce]:
    """Bound and not listening, so that nobody else gets the port."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield Announce(*bound.getsockname())


def attempts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weights-connect"]


def first_version(feed: WeightFeed, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (update := feed.poll()) is not None:
            with update:
                return update.version
        time.sleep(0.02)
    return None


def test_a_new_learner_does_not_wait_for_the_attempt_at_one_that_is_gone(learner: Publisher, feed: WeightFeed) -> None:
    with nobody() as gone:
        feed.connect(gone)
        assert first_version(feed, 1.0) is None
        feed.connect(Announce(*learner.address))
        assert first_version(feed, 10.0) == 7


def test_leaving_calls_off_the_attempt_under_way(feed: WeightFeed) -> None:
    with nobody() as gone:
        feed.connect(gone)
        assert first_version(feed, 0.5) is None
        assert attempts()
        feed.close()
        deadline = time.monotonic() + 10.0
        while attempts():
            assert time.monotonic() < deadline, "it lasts until its timeout of 30 s"
            time.sleep(0.05)


def test_hearing_of_the_same_learner_again_changes_nothing(learner: Publisher, feed: WeightFeed) -> None:
    feed.connect(Announce(*learner.address))
    assert first_version(feed, 10.0) == 7
    feed.connect(Announce(*learner.address))
    feed.connect(None)
    learner.publish(8, {"weight": torch.arange(6.0)})
    assert first_version(feed, 10.0) == 8
    assert feed.counters["connects"] == 1


def test_without_a_learner_for_too_long_it_gives_up_and_says_why() -> None:
    feed = WeightFeed("g", device="cpu", peer_timeout_s=1.0, learner_timeout_s=0.2)
    assert feed.waits_for == "a learner"
    with pytest.raises(LearnerLost, match=r"no learner for .* none was announced"):
        first_version(feed, 5.0)
