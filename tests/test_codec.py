"""The codec: every kind survives the way there and back, and no bytes whatever do more than raise `Malformed`."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any, get_args

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import messages as m
from protocols.codec import ARRAY, ARRAYS_LIMIT, HEADER_LIMIT, KINDS, MAX_ID, Frame, Malformed, decode, encode
from protocols.link_messages import (
    PROTOCOL,
    Ack,
    Announce,
    Goodbye,
    Heartbeat,
    Held,
    Hello,
    Role,
    Status,
    StatusRequest,
    Welcome,
)

ids = st.integers(0, MAX_ID)
small = st.integers(0, 1 << 31)
texts = st.text(max_size=30)
floats = st.floats(allow_nan=False, allow_infinity=False)
figures = st.dictionaries(texts, floats, max_size=4)
names = st.text("abc -/é", min_size=1, max_size=80)


def ints(low: int = 0, **sizes: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.integers(low, (1 << 31) - 1), **sizes).map(lambda x: np.array(x, m.INT))


@st.composite
def responses(draw: st.DrawFn, min_size: int = 0) -> dict[str, Any]:
    """Tokens, their log-probabilities and the runs of versions over them."""
    runs = draw(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=min_size, max_size=4))
    size = sum(count for _, count in runs)
    logprobs = draw(st.lists(st.floats(-50, 0, width=32), min_size=size, max_size=size))
    return {
        "tokens": draw(ints(min_size=size, max_size=size)),
        "logprobs": np.array(logprobs, m.FLOAT),
        "versions": runs,
    }


@st.composite
def rollouts(draw: st.DrawFn) -> m.Rollout:
    return m.Rollout(
        group=draw(small), sample=draw(small), fence=draw(small), finish=draw(st.sampled_from(["stop", "length"])),
        text=draw(texts), started_at=draw(floats), finished_at=draw(floats), **draw(responses(min_size=1)),
    )  # fmt: skip


@st.composite
def partials(draw: st.DrawFn) -> m.Partial:
    return m.Partial(sample=draw(st.integers(0, 7)), **draw(responses()))


@st.composite
def batches(draw: st.DrawFn) -> m.Batch:
    sizes = draw(st.lists(st.integers(0, 3), max_size=3))
    prompts = draw(st.lists(st.integers(1, 4), min_size=len(sizes), max_size=len(sizes)))
    rows = sum(sizes)
    lengths = draw(st.lists(st.integers(1, 5), min_size=rows, max_size=rows))
    total = sum(lengths)
    return m.Batch(
        step=draw(small),
        groups=draw(ints(min_size=len(sizes), max_size=len(sizes))),
        prompt_lengths=np.array(prompts, m.INT),
        prompts=draw(ints(min_size=sum(prompts), max_size=sum(prompts))),
        sizes=np.array(sizes, m.INT),
        lengths=np.array(lengths, m.INT),
        tokens=draw(ints(min_size=total, max_size=total)),
        logprobs=np.linspace(-3, 0, total, dtype=m.FLOAT),
        versions=np.arange(total, dtype=m.INT),
        rewards=np.linspace(-1, 1, rows, dtype=m.FLOAT),
        correct=np.arange(rows) % 2 == 0,
        truncated=np.arange(rows) % 3 == 0,
    )


announces = st.builds(Announce, texts, st.integers(0, 65535))
indices = st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True)
finishes = st.sampled_from(["stop", "length"])
group_sizes = st.builds(m.GroupSize, small, small, st.lists(small, max_size=4))
STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    m.Ticket: st.builds(
        m.Ticket, group=small, samples=indices, fence=small, prompt=ints(min_size=1, max_size=5), seed=ids,
        sampling=st.builds(m.Sampling, st.integers(1, 99), st.floats(0.1, 2), st.floats(0.1, 1), st.integers(0, 9)),
        min_version=small, resume=st.lists(partials(), max_size=3),
    ),
    m.Rollout: rollouts(),
    m.HandBack: st.builds(m.HandBack, small, small, st.just(list(range(8))), st.lists(partials(), max_size=3)),
    m.GradeTask: st.builds(m.GradeTask, small, small, small, texts, texts, texts, texts, small, finishes),
    m.Grade: st.builds(
        m.Grade, small, small, small, st.sampled_from(get_args(m.Verdict)), st.booleans(), floats, figures, texts, floats
    ),
    m.PlanRequest: st.builds(m.PlanRequest, small),
    m.Plan: st.builds(m.Plan, small, st.lists(group_sizes, max_size=3), st.none() | texts, st.booleans(), figures),
    m.Pull: st.builds(m.Pull, small, st.lists(small, max_size=9)),
    m.Batch: batches(),
    m.StepCommit: st.builds(m.StepCommit, small, texts, texts, floats, floats, figures),
    Announce: announces,
    Heartbeat: st.builds(Heartbeat, texts, floats, small, st.lists(st.builds(Held, small, small)), figures),
    Hello: st.builds(Hello, st.sampled_from(get_args(Role)), names, texts, small, st.integers(0, 999), small),
    Welcome: st.builds(Welcome, texts, floats, small, st.none() | announces),
    Ack: st.builds(Ack, ids, st.none() | texts),
    StatusRequest: st.builds(StatusRequest),
    Status: st.builds(
        Status, texts, small, small, st.booleans(), figures,
        st.lists(st.fixed_dictionaries({"name": texts, "counters": figures}), max_size=2), figures,
        st.lists(figures, max_size=2),
    ),
    Goodbye: st.builds(Goodbye, texts),
}  # fmt: skip
messages = st.one_of(*STRATEGIES.values())


def plain(value: Any) -> Any:
    """Comparable: arrays as (dtype, bytes)."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tobytes())
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    return [plain(item) for item in value] if isinstance(value, list) else value


def on_the_wire(message: m.Message, id: int = 0) -> list[Frame]:
    return [bytes(frame) for frame in encode(message, id)]


def header(**fields: Any) -> list[Frame]:
    return [msgpack.packb({"v": PROTOCOL, "i": 7, "k": "pull", "a": [], "b": b"", **fields})]


def outcome(frames: list[Frame]) -> Malformed | None:
    """What the frames are refused with; None when they are a message. Any other exception fails the test."""
    try:
        decode(frames)
    except Malformed as error:
        return error
    return None


def refusal(frames: list[Frame]) -> Malformed:
    with pytest.raises(Malformed) as caught:
        decode(frames)
    return caught.value


def test_every_kind_has_a_strategy() -> None:
    assert set(STRATEGIES) == set(KINDS.values())


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type) -> None:
    @settings(max_examples=40, deadline=None)
    @given(STRATEGIES[kind], ids)
    def there_and_back(message: m.Message, id: int) -> None:
        got_id, got = decode(on_the_wire(message, id))
        assert got_id == id
        assert type(got) is kind
        assert plain(got) == plain(message)

    there_and_back()


def batch(rows: int = 16, length: int = 2304) -> m.Batch:
    total = rows * length
    return m.Batch(
        step=1,
        groups=np.array([3], m.INT),
        prompt_lengths=np.array([200], m.INT),
        prompts=np.arange(200, dtype=m.INT),
        sizes=np.array([rows], m.INT),
        lengths=np.full(rows, length, m.INT),
        tokens=np.arange(total, dtype=m.INT),
        logprobs=np.zeros(total, m.FLOAT),
        versions=np.zeros(total, m.INT),
        rewards=np.zeros(rows, m.FLOAT),
        correct=np.zeros(rows, m.BOOL),
        truncated=np.zeros(rows, m.BOOL),
    )


def test_arrays_are_read_only_views_of_the_frames() -> None:
    sent = batch()
    frames = encode(sent)
    assert any(np.shares_memory(np.frombuffer(frame, np.uint8), sent.tokens) for frame in frames[1:])
    received = [bytearray(frame) for frame in frames]
    _, got = decode([memoryview(frame) for frame in received])
    assert isinstance(got, m.Batch)
    assert not got.tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        got.tokens[0] = 1
    assert any(np.shares_memory(np.frombuffer(frame, np.uint8), got.tokens) for frame in received[1:])


def test_strided_and_empty_arrays() -> None:
    message = m.Ticket(0, [0], 0, np.arange(10, dtype=m.INT)[::3], m.Sampling(1), 0)
    assert decode(on_the_wire(message))[1].prompt.tolist() == [0, 3, 6, 9]
    nothing = m.HandBack(0, 0, [1], [m.Partial(1, np.zeros(0, m.INT), np.zeros(0, m.FLOAT), [])])
    assert decode(on_the_wire(nothing))[1].partials[0].tokens.shape == (0,)


def test_a_batch_costs_less_than_a_fifth_of_a_millisecond() -> None:
    message, times = batch(), []
    for _ in range(50):
        began = time.perf_counter()
        decode(encode(message))
        times.append(time.perf_counter() - began)
    assert min(times) < 0.2e-3


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), m.INT), np.zeros(2, ">i4"), np.zeros(2, np.int64), np.array("x"), np.zeros(1, object)],
    ids=["two axes", "big endian", "int64", "text", "objects"],
)
def test_other_arrays_are_not_sent(array: np.ndarray) -> None:
    with pytest.raises(TypeError, match="StepCommit: got an array"):
        encode(m.StepCommit(1, "", "", 0.0, 0.0, {"x": array}))  # type: ignore[dict-item]


# --- what strangers send -------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_bytes(frames: list[bytes]) -> None:
    refusal(list(frames))


leaves = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary()
data = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@settings(max_examples=400, deadline=None)
@given(st.sampled_from("vikab"), data, st.lists(st.binary(max_size=20), max_size=2))
def test_headers_with_one_strange_field(field: str, value: Any, frames: list[bytes]) -> None:
    error = outcome([*header(**{field: value}), *frames])
    assert error is None or error.reason in {"size", "header", "version", "kind", "arrays", "body"}


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.dictionaries(texts | st.sampled_from(["type", "step", "groups"]), data))
def test_bodies_of_plain_data(kind: str, body: dict[str, Any]) -> None:
    error = outcome(header(k=kind, b=msgpack.packb({**body, "type": kind})))
    assert error is None or (error.reason, error.id) == ("body", 7)


@settings(max_examples=500, deadline=None)
@given(messages, st.data())
def test_mutated_messages(message: m.Message, draw: st.DataObject) -> None:
    """One byte changed, one piece cut out, a frame dropped, doubled or lengthened: refused or still a whole message."""
    frames = [bytearray(frame) for frame in on_the_wire(message, 7)]
    number = draw.draw(st.integers(0, len(frames) - 1))
    frame = frames[number]
    at = draw.draw(st.integers(0, max(0, len(frame) - 1)))
    match draw.draw(st.sampled_from(["byte", "cut", "drop", "double", "grow"])):
        case "byte" if frame:
            frame[at] = draw.draw(st.integers(0, 255))
        case "cut":
            del frame[at : at + draw.draw(st.integers(1, 9))]
        case "drop":
            del frames[number]
        case "double":
            frames.insert(number, bytearray(frame))
        case "grow":
            frame += draw.draw(st.binary(min_size=1, max_size=9))
    outcome([bytes(frame) for frame in frames])


def test_what_is_refused_and_why() -> None:
    good = on_the_wire(m.Ticket(0, [0], 0, np.arange(3, dtype=m.INT), m.Sampling(1), 0), 7)
    fields = msgpack.unpackb(good[0])
    array = msgpack.ExtType

    def changed(**changes: Any) -> list[Frame]:
        return [msgpack.packb(fields | changes), *good[1:]]

    def body(prompt: Any) -> bytes:
        return msgpack.packb({**msgpack.unpackb(fields["b"], ext_hook=array), "prompt": prompt})

    cases = {
        "nothing": ([], "size", 0),
        "an empty frame": ([b""], "size", 0),
        "too many arrays": ([good[0], *[b""] * (ARRAYS_LIMIT + 1)], "size", 0),
        "too long": ([b"\0" * (HEADER_LIMIT + 1)], "size", 0),
        "no map": ([b"\x93\1\2\3"], "header", 0),
        "no id": (changed(i=None), "header", 0),
        "a boolean id": (changed(i=True), "header", 0),
        "a negative id": (changed(i=-1), "header", 0),
        "an id beyond 63 bits": (changed(i=1 << 63), "header", 0),
        "another version": (changed(v=PROTOCOL + 1), "version", 7),
        "another kind": (changed(k="pickle"), "kind", 7),
        "a kind that is no text": (changed(k=[1]), "kind", 7),
        "the body of another kind": (changed(k="rollout"), "body", 7),
        "another dtype": (changed(a=["|O"]), "arrays", 7),
        "a dtype that is no text": (changed(a=[["<i4"]]), "arrays", 7),
        "fewer specs than frames": (changed(a=[]), "arrays", 7),
        "half a number": ([good[0], good[1][:-1]], "arrays", 7),
        "the wrong dtype for the field": (changed(a=["<f4"]), "body", 7),
        "no array there": (changed(b=body([1, 2, 3])), "body", 7),
        "array 0": (changed(b=body(array(ARRAY, b"\0\0"))), "body", 7),
        "array 2 of 1": (changed(b=body(array(ARRAY, b"\2\0"))), "body", 7),
        "another extension": (changed(b=body(array(9, b"\1\0"))), "body", 7),
        "a body that is no bytes": (changed(b="text"), "body", 7),
        "an array that nothing names": ([*changed(a=["<i4", "<i4"]), b""], "body", 7),
    }
    got = {name: (refusal(frames).reason, refusal(frames).id) for name, (frames, _, _) in cases.items()}
    assert got == {name: (reason, id) for name, (_, reason, id) in cases.items()}


def test_kinds_that_are_not_expected_here() -> None:
    frames = on_the_wire(Goodbye("x"), 3)
    assert decode(frames, {"goodbye"})[0] == 3
    with pytest.raises(Malformed, match=r"got 'goodbye', expected one of \['ack'\]"):
        decode(frames, {"ack"})


PULL = b"\x83\xa4type\xa4pull\xa4step\x01\xa6groups"
STATUS = b"\x82\xa4type\xa6status\xa7workers\x91\x81\xa1a"
HUGE = {
    "a list that claims 2 G entries": ("pull", PULL + b"\xdd\x7f\xff\xff\xff"),
    "a list that claims 16 M entries": ("pull", PULL + b"\xdd\x00\xff\xff\xff\x01"),
    "a text that claims 4 GB": ("pull", PULL + b"\xdb\xff\xff\xff\xff"),
    "lists in lists": ("status", STATUS + b"\xdd\x00\xff\xff\xff" * 800_000),
    "maps in maps": ("status", STATUS + b"\xdf\x00\xff\xff\xff\xa1a" * 500_000),
}


@pytest.mark.parametrize(("kind", "body"), HUGE.values(), ids=HUGE)
def test_claimed_sizes_cost_nothing(kind: str, body: bytes) -> None:
    frames = header(k=kind, b=body)
    tracemalloc.start()
    began = time.process_time()
    try:
        assert refusal(frames).reason == "body"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(frames[0]) + (1 << 20)
    assert time.process_time() - began < 0.5


def test_a_nested_header_costs_little() -> None:
    frames: list[Frame] = [b"\xdd\x00\x00\x0f\xff" * 800_000]
    tracemalloc.start()
    try:
        assert refusal(frames).reason == "header"
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
