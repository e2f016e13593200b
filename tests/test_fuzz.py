"""The fuzzer, briefly; and names in messages, which are never paths."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_peers import Buffer

from protocols import messages as m
from protocols.codec import KINDS, Malformed, decode
from protocols.link import Client
from protocols.link_messages import Hello
from tools.fuzzing.codec import fuzz_codec
from tools.fuzzing.link import fuzz_link
from tools.fuzzing.mutate import Mutator
from tools.fuzzing.samples import frames_of_samples, samples

HOSTILE = [
    "../../x",
    "/etc/passwd",
    "a/../../b",
    "$(reboot)",
    "x'; DROP TABLE rollouts; --",
    "~/.ssh/id",
    "con.key",
    "[red]",
]


def test_samples_are_of_every_kind() -> None:
    assert {type(message) for message in samples()} == set(KINDS.values())


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=30, deadline=None)
def test_mutations_are_refused_or_messages(seed: int) -> None:
    mutator = Mutator(frames_of_samples(), seed)
    for _ in range(50):
        try:
            id, message = decode(mutator.next())
        except Malformed:
            continue
        assert id >= 0
        assert type(message) in KINDS.values()


def test_the_codec_refuses_and_does_not_grow() -> None:
    found = fuzz_codec(10_000, seed=5)
    assert found.violations == []
    refused = sum(count for outcome, count in found.outcomes.items() if outcome.startswith("refused"))
    assert refused == 10_000
    assert found.growth_mib < 64.0


def test_the_link_refuses_and_cuts_off() -> None:
    found = fuzz_link(600, seed=5, raw=1)
    assert found.violations == []
    assert found.growth_mib < 128.0
    for keys in ("no keys", "with keys"):
        for kind in ("4 GiB claimed", "unfinished frame", "half a greeting"):
            assert found.outcomes[f"raw, {keys}, {kind}: cut off"] == 1


@pytest.mark.parametrize("name", ["a\0b", "x" * 81, "", "a\nb", "\u202eabc", "x" * 10_000_000])
def test_names_that_cannot_be_printed_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"hello\.name"):
        Hello("generator", name, "h", 1)


def test_names_of_messages_are_no_paths() -> None:
    """A name is a key of a table: whatever it looks like, no file is named after it."""
    before = set(os.listdir())
    with Buffer() as buffer:
        for name in HOSTILE:
            client = Client(buffer.address, Hello("generator", name, "../../h", 1, 8), timeout_s=20.0)
            client.status("../../state", counters={"../../c": 1.0})
            client.send(m.HandBack(1, 0, [0]))
            client.flush(20.0)
            client.close()
        assert buffer.joined() == HOSTILE
    assert set(os.listdir()) == before
