"""The link with real sockets and processes: nothing is lost however the connection breaks, and nobody can disturb others."""

from __future__ import annotations

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from link_peers import Buffer, Proxy, hello, rollout, wait_until

from protocols import messages as m
from protocols.codec import decode, encode
from protocols.link import Client, Joined, LinkError, LinkRefused, LinkTimeout, Received, Server
from protocols.link_messages import PROTOCOL, Ack, Goodbye, Heartbeat, Held, Status, StatusRequest, Welcome
from protocols.link_outbox import Outbox
from protocols.link_server import STRIKES

PEERS = str(Path(__file__).parent / "link_peers.py")
STATUS = Status(run="r", step=1, steps=2, done=False, ledger={}, workers=[], metrics={}, evals=[])


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    with Buffer() as buffer:
        yield buffer


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a link's thread behind."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("link of")] == []


def connect(address: str, name: str = "w", **settings: float) -> Client:
    return Client(address, hello(name), **{"timeout_s": 5.0, "silence_s": 1.0, **settings})  # type: ignore[arg-type]


class Raw:
    """A plain DEALER that says whatever it likes."""

    def __init__(self, address: str, identity: bytes | None = None) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.setsockopt(zmq.RECONNECT_IVL, -1)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(address)

    def say(self, message: m.Message, id: int = 0) -> None:
        self.socket.send_multipart(encode(message, id))

    def hear(self, timeout_s: float = 5.0) -> tuple[int, m.Message]:
        assert self.socket.poll(int(timeout_s * 1000)), "nothing came"
        return decode(self.socket.recv_multipart())

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.destroy(linger=0)


# --- both ways -------------------------------------------------------------------------------------------------------


def test_both_directions_in_order(buffer: Buffer) -> None:
    client = connect(buffer.address)
    for number in range(500):
        client.send(rollout(number))
    buffer.say("w", *(m.Pull(number, []) for number in range(500)))
    client.flush(5.0)
    assert buffer.groups() == list(range(500))
    assert client.unacknowledged == 0
    assert [client.receive(5.0) for _ in range(500)] == [m.Pull(number, []) for number in range(500)]
    assert client.receive(0.0) is None
    client.close()
    wait_until(lambda: buffer.left() == [("w", "closed")], "the goodbye")


def test_a_large_batch_arrives_whole(buffer: Buffer) -> None:
    total = 1_000_000
    one, many = np.ones(1, m.INT), np.arange(total, dtype=m.INT)
    batch = m.Batch(
        step=1, groups=one, prompt_lengths=one, prompts=one, sizes=one, lengths=one * total, tokens=many,
        logprobs=np.zeros(total, m.FLOAT), versions=many, rewards=np.ones(1, m.FLOAT),
        correct=np.ones(1, m.BOOL), truncated=np.zeros(1, m.BOOL),
    )  # fmt: skip
    client = connect(buffer.address)
    buffer.say("w", batch)
    got = client.receive(5.0)
    assert isinstance(got, m.Batch)
    np.testing.assert_array_equal(got.tokens, many)
    client.close()


def test_ask_leaves_other_messages_for_receive(buffer: Buffer) -> None:
    client = connect(buffer.address)
    buffer.say("w", m.Pull(1, []), STATUS, m.Pull(2, []))
    assert client.ask(StatusRequest(), Status, 5.0) == STATUS
    assert [client.receive(5.0), client.receive(5.0)] == [m.Pull(1, []), m.Pull(2, [])]
    assert client.unacknowledged == 0, "a status request is not kept"
    client.close()


def test_refusals_come_as_messages_and_end_a_question(buffer: Buffer) -> None:
    buffer.refuse = lambda message: f"no {type(message).__name__}"
    client = connect(buffer.address)
    id = client.send(rollout(1))
    assert client.receive(5.0) == Ack(id, "no Rollout")
    with pytest.raises(LinkRefused, match=r"w: tcp://\S+ refused HandBack: no HandBack"):
        client.ask(m.HandBack(1, 0, [0]), m.Ticket, 5.0)
    assert client.unacknowledged == 0
    client.close()


def test_heartbeats_go_on_while_the_worker_computes(buffer: Buffer) -> None:
    client = connect(buffer.address)
    client.status("computes", version=3, held=[Held(1, 2)], counters={"tokens": 5.0})
    end = time.monotonic() + 1.0
    while time.monotonic() < end:  # holds the interpreter, as a worker's own Python does
        sum(range(1000))
    beats = [beat for beat in buffer.received(Heartbeat) if beat.state == "computes"]
    assert len(beats) >= 5
    assert (beats[-1].version, beats[-1].held, beats[-1].counters) == (3, [Held(1, 2)], {"tokens": 5.0})
    assert len({beat.since for beat in beats}) == 1
    client.status("rests")
    wait_until(lambda: buffer.received(Heartbeat)[-1].state == "rests", "the new state")
    last = buffer.received(Heartbeat)[-1]
    assert (last.version, last.since > beats[-1].since) == (3, True)
    assert client.connected
    assert client.silent_s < 0.5
    client.close()


def test_the_first_version_does_not_wait_for_the_next_heartbeat() -> None:
    """The buffer gives a generator nothing before it: an interval is lost otherwise."""
    with Buffer(heartbeat_s=30.0) as buffer:
        client = connect(buffer.address, silence_s=60.0)
        wait_until(lambda: [b.version for b in buffer.received(Heartbeat)] == [None], "the first heartbeat")
        client.status("decodes", version=0)
        wait_until(lambda: [b.version for b in buffer.received(Heartbeat)] == [None, 0], "the version", 10.0)
        client.status("decodes", version=1)
        time.sleep(0.3)
        assert len(buffer.received(Heartbeat)) == 2
        client.close()


# --- waits say what they wait for ------------------------------------------------------------------------------------


def test_no_buffer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = f"tcp://127.0.0.1:{reserved.getsockname()[1]}"
    with pytest.raises(LinkTimeout, match=rf"w: waited 0\.3 s for a buffer's welcome from {address}"):
        connect(address, timeout_s=0.3)
    with pytest.raises(LinkError, match="nonsense: Invalid argument"):
        connect("nonsense", timeout_s=0.3)


def test_a_buffer_that_starts_later_is_found(buffer: Buffer) -> None:
    with Proxy(buffer.address) as proxy:
        proxy.cut()
        threading.Timer(0.3, proxy.mend).start()
        connect(proxy.address).close()


def test_timeouts_name_what_they_wait_for(buffer: Buffer) -> None:
    buffer.acknowledges = False
    client = connect(buffer.address, max_unacknowledged_bytes=5000)
    with pytest.raises(LinkTimeout, match=r"w: waited 0\.1 s for a Ticket from tcp://.*; 1 messages of \d+ bytes"):
        client.ask(m.HandBack(1, 0, [0]), m.Ticket, 0.1)
    with pytest.raises(LinkTimeout, match=r"w: waited 0\.1 s for acknowledgements from tcp://"):
        client.flush(0.1)
    client.send(rollout(1, tokens=1000))
    with pytest.raises(LinkTimeout, match=r"w: waited 0\.1 s for room to send .* 2 messages of 8\d+ bytes are unack"):
        client.send(rollout(2), timeout_s=0.1)
    assert client.receive(0.05) is None
    client.close()


def test_send_goes_on_when_there_is_room(buffer: Buffer) -> None:
    client = connect(buffer.address, max_unacknowledged_bytes=20_000)
    buffer.paused = True
    sender = threading.Thread(target=lambda: [client.send(rollout(n, tokens=1000)) for n in range(50)])
    sender.start()
    wait_until(lambda: client.unacknowledged >= 3, "messages")
    time.sleep(0.1)
    assert client.unacknowledged == 3
    buffer.paused = False
    sender.join(5.0)
    client.flush(5.0)
    assert buffer.groups() == list(range(50))
    client.close()


# --- connections that break ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "swallow", "freeze"])
def test_nothing_is_lost_or_doubled_when_the_connection_breaks(buffer: Buffer, how: str) -> None:
    """Traffic in both directions through a proxy that breaks several times; the buffer lives on, so each arrives once."""
    draw = random.Random(how)
    got: list[int] = []
    with Proxy(buffer.address) as proxy:
        client = connect(proxy.address, silence_s=0.3)
        for number in range(600):
            client.send(rollout(number, tokens=draw.randint(1, 3000)))
            buffer.say("w", m.Pull(number, []))
            if number % 150 == 100:
                time.sleep(draw.random() * 0.05)
                getattr(proxy, how)()
                wait_until(lambda: not client.connected, "the worker to notice")
                proxy.mend()
                wait_until(lambda: client.connected, "a new connection")
            while (message := client.receive(0.0)) is not None:
                got.append(message.step)  # type: ignore[union-attr]
        client.flush(20.0)
        while len(got) < 600 and (message := client.receive(5.0)) is not None:
            got.append(message.step)  # type: ignore[union-attr]
        client.close()
    assert buffer.groups() == list(range(600))
    assert got == list(range(600))
    assert buffer.joined().count("w") >= 5, "the connection was made anew"
    assert [reason for _, reason in buffer.left()] in ([], ["closed"]), "a new connection is no new worker"


def test_silence_of_the_buffer_is_noticed(buffer: Buffer) -> None:
    client = connect(buffer.address, silence_s=0.3)
    welcome = client.welcome
    buffer.paused = True
    wait_until(lambda: not client.connected, "the client to notice")
    assert client.silent_s > 0.25
    buffer.paused = False
    wait_until(lambda: client.connected, "a new connection")
    assert client.welcome is not welcome
    client.close()


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen([sys.executable, PEERS, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_buffer_that_is_killed_and_started_anew_loses_nothing(tmp_path: Path) -> None:
    """At least once across a restart: every number is on disk in the end, whatever moments the kills hit."""
    path, count = tmp_path / "received", 3000
    process = start("buffer", "tcp://127.0.0.1:0", str(path))
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    client = connect(address, silence_s=0.5)
    sender = threading.Thread(target=lambda: [client.send(rollout(n)) or time.sleep(0.0003) for n in range(count)])
    sender.start()
    try:
        for _ in range(3):
            time.sleep(0.3)
            process.kill()
            process.wait()
            process.stdout.close()
            process = start("buffer", address, str(path))
            assert process.stdout is not None
            assert process.stdout.readline().strip() == address
        sender.join(10.0)
        client.flush(20.0)
        assert {int(line) for line in path.read_text().split()} == set(range(count))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        client.close()


def test_a_worker_that_stops_is_left_and_comes_back(buffer: Buffer) -> None:
    """SIGSTOP past the peer timeout: the buffer forgets it. On SIGCONT it introduces itself and nothing is lost."""
    with Buffer(peer_timeout_s=0.5) as impatient:
        worker = start("worker", impatient.address, "2000")
        try:
            wait_until(lambda: len(impatient.groups()) > 200, "rollouts")
            worker.send_signal(signal.SIGSTOP)
            wait_until(lambda: len(impatient.left()) == 1, "the worker to be given up")
            assert impatient.left()[0][1].startswith("silent for 0.")
            worker.send_signal(signal.SIGCONT)
            assert worker.stdout is not None
            assert [worker.stdout.readline().strip() for _ in range(2)] == ["sent", "flushed"]
            assert set(impatient.groups()) == set(range(2000))
            assert len(impatient.joined()) >= 2
        finally:
            worker.kill()
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()


def test_a_worker_without_close_ends_with_its_process(buffer: Buffer) -> None:
    code = f"from link_peers import *; Client({buffer.address!r}, hello('x'), timeout_s=5.0); print('there')"
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent.parent}:{Path(__file__).parent}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=20, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "there\n", "")


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_newer_worker_of_a_name_wins(buffer: Buffer) -> None:
    older = connect(buffer.address)
    newer = connect(buffer.address)
    got = older.receive(5.0)
    assert isinstance(got, Goodbye)
    assert got.reason == "replaced: another worker said hello as w"
    wait_until(lambda: len(buffer.joined()) == 2, "both")
    assert buffer.left() == [("w", "replaced by another worker of this name")]
    newer.send(rollout(1))
    newer.flush(5.0)
    time.sleep(0.4)
    assert len(buffer.joined()) == 2, "the older does not come back"
    older.close()
    newer.close()


def test_a_replaced_worker_that_has_not_heard_is_told_again(buffer: Buffer) -> None:
    with Raw(buffer.address, b"s1.1") as older, connect_raw(buffer, b"s2.1") as newer:
        older.say(hello(), 1)
        assert isinstance(older.hear()[1], Welcome)
        newer.say(hello(), 1)
        assert isinstance(newer.hear()[1], Welcome)
        assert isinstance(older.hear()[1], Goodbye)
        with Raw(buffer.address, b"s1.2") as again:
            again.say(hello(), 1)
            assert isinstance(again.hear()[1], Goodbye)
    assert buffer.joined() == ["w", "w"]


def connect_raw(buffer: Buffer, identity: bytes) -> Raw:
    return Raw(buffer.address, identity)


def test_an_acknowledgement_for_the_replaced_worker_settles_nothing_of_the_newer(buffer: Buffer) -> None:
    buffer.acknowledges = False
    older = connect(buffer.address)
    first = older.send(rollout(1))
    wait_until(lambda: buffer.groups() == [1], "the rollout")
    newer = connect(buffer.address)
    second = newer.send(rollout(2))
    assert first != second
    buffer.say("w", Ack(first))
    time.sleep(0.2)
    assert newer.unacknowledged == 1
    older.close()
    newer.close()


def test_goodbye_from_the_buffer_ends_the_link(buffer: Buffer) -> None:
    client = connect(buffer.address)
    buffer.say("w", Goodbye("complete"))
    assert client.receive(5.0) == Goodbye("complete")
    wait_until(lambda: buffer.left() == [("w", "the buffer said goodbye")], "the answer")
    client.send(rollout(1))
    with pytest.raises(LinkTimeout, match=r"for acknowledgements from tcp://\S+, which said goodbye \(complete\)"):
        client.flush(0.2)
    began = time.monotonic()
    client.close()
    assert time.monotonic() - began < 0.5


# --- versions --------------------------------------------------------------------------------------------------------


def test_another_protocol_version_is_refused_by_name(buffer: Buffer) -> None:
    with pytest.raises(LinkRefused, match=rf"protocol: the buffer speaks {PROTOCOL}, old 99"):
        Client(buffer.address, hello("old", protocol=99), timeout_s=5.0)
    assert buffer.joined() == []


def other_version(frames: list) -> list:
    return [msgpack.packb({**msgpack.unpackb(frames[0]), "v": 99}), *frames[1:]]


def test_a_frame_of_another_version_is_answered(buffer: Buffer) -> None:
    with Raw(buffer.address) as raw:
        raw.socket.send_multipart(other_version(encode(hello("old"), 5)))
        assert raw.hear() == (0, Ack(5, f"protocol: got version 99, expected {PROTOCOL}"))
    assert buffer.server.counters["malformed_version"] == 1


def test_a_buffer_of_another_version_is_named() -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    failure: list[LinkError] = []

    def dial() -> None:
        try:
            connect(f"tcp://127.0.0.1:{port}")
        except LinkError as error:
            failure.append(error)

    thread = threading.Thread(target=dial)
    thread.start()
    identity, *_ = router.recv_multipart()
    router.send_multipart([identity, *other_version(encode(Welcome("r", 1.0, 0), 5))])
    thread.join(5.0)
    assert isinstance(failure[0], LinkRefused)
    assert f"got version 99, expected {PROTOCOL}" in str(failure[0])
    context.destroy(linger=0)


# --- strangers --------------------------------------------------------------------------------------------------------


def test_garbage_does_not_disturb_others(buffer: Buffer) -> None:
    client = connect(buffer.address)
    draw = random.Random(0)
    port = int(buffer.address.rpartition(":")[2])
    with Raw(buffer.address) as raw, Raw(buffer.address, b"s.1") as member:
        member.say(hello("liar"), 1)
        assert isinstance(member.hear()[1], Welcome)
        for number in range(200):
            client.send(rollout(number))
            raw.socket.send_multipart([draw.randbytes(draw.randint(0, 300)) for _ in range(draw.randint(1, 4))])
            member.socket.send_multipart([draw.randbytes(50)])
            if number % 20 == 0:
                with socket.create_connection(("127.0.0.1", port)) as tcp:
                    tcp.sendall(draw.choice([b"GET / HTTP/1.1\r\n\r\n", draw.randbytes(500), b"\xff" + bytes(63)]))
        client.flush(5.0)
        wait_until(lambda: buffer.server.counters["ignored"] >= 300, "the flood to be cut off")
    assert buffer.groups() == list(range(200))
    assert buffer.server.counters["malformed_header"] + buffer.server.counters["malformed_size"] >= 2 * STRIKES
    assert [worker for worker, _ in buffer.left()] == ["liar"]
    assert buffer.left()[0][1].startswith(f"sent {STRIKES} messages that are none; the last: ")
    client.close()


def test_acknowledgements_in_a_row_are_one_message_and_settle_no_other() -> None:
    server = Server("tcp://127.0.0.1:0", heartbeat_s=5.0, peer_timeout_s=5.0)
    with Raw(server.address, b"s.1") as raw:
        raw.say(hello(), 4)
        for id in range(5, 12):
            raw.say(rollout(id), id)
        events: list[object] = []

        def all_came() -> bool:
            events.extend(server.poll(0.01))
            return len(events) == 8

        wait_until(all_came, "the hello and the rollouts")
        for id, refused in ((5, None), (6, None), (7, "no"), (8, None), (10, None), (11, None)):
            server.ack("w", id, refused)
        server.poll(0.0)
        raw.hear()
        answers = [raw.hear()[1] for _ in range(4)]
    server.close()
    assert answers == [Ack(6, count=2), Ack(7, "no"), Ack(8), Ack(11, count=2)]


def test_a_message_that_is_none_is_refused_by_its_id(buffer: Buffer) -> None:
    with Raw(buffer.address, b"s.1") as raw:
        raw.say(hello(), 4)
        raw.hear()
        frames = encode(rollout(1), 5)
        raw.socket.send_multipart([frames[0], frames[1], b"\0\0\0\x7f" * 3])  # log-probabilities of 1e38
        raw.say(rollout(2), 6)
        answers = [raw.hear()[1] for _ in range(2)]
    assert isinstance(answers[0], Ack)
    assert answers[0].id == 5
    assert "rollout.logprobs: got 'a positive or NaN value'" in str(answers[0].refused)
    assert answers[1] == Ack(6)
    assert buffer.server.counters["malformed_body"] == 1


def test_only_what_workers_say_is_heard(buffer: Buffer) -> None:
    with Raw(buffer.address, b"s.1") as raw:
        raw.say(rollout(1), 1)
        assert raw.hear()[1] == Ack(0, "say hello first")
        raw.say(hello(), 1)
        raw.hear()
        raw.say(STATUS, 2)
        answer = raw.hear()[1]
    assert isinstance(answer, Ack)
    assert "kind: got 'status', expected one of ['ack', 'goodbye'," in str(answer.refused)
    assert buffer.groups() == []


def test_oversized() -> None:
    with Buffer(max_message_bytes=20_000) as buffer:
        other = connect(buffer.address, "other")
        with Raw(buffer.address, b"s.1") as raw:
            raw.say(hello(), 1)
            raw.hear()
            raw.say(rollout(1, tokens=4000), 2)  # two arrays of 16 kB
            answer = raw.hear()[1]
            assert isinstance(answer, Ack)
            assert "Rollout: got 32" in str(answer.refused)
            raw.say(rollout(1, tokens=6000), 3)  # an array of 24 kB: ZeroMQ ends the connection at its length
            raw.say(rollout(2), 4)
            assert not raw.socket.poll(200)
        assert buffer.server.counters["malformed_size"] == 1
        client = connect(buffer.address, max_message_bytes=20_000)
        with pytest.raises(LinkError, match=r"w: Rollout: got 32\d+ bytes, expected at most 20000"):
            client.send(rollout(1, tokens=4000))
        other.send(rollout(9))
        other.flush(5.0)
        assert buffer.groups() == [9]
        client.close()
        other.close()


def test_a_worker_that_takes_nothing_blocks_nobody() -> None:
    with Buffer(max_queue_bytes=4 << 20, peer_timeout_s=30.0) as buffer:
        client = connect(buffer.address, "quick")
        with Raw(buffer.address, b"s.1") as raw:
            raw.socket.rcvhwm = 1
            raw.say(hello("slow"), 1)
            wait_until(lambda: "slow" in buffer.joined(), "the slow worker")
            ticket = m.Ticket(0, [0], 0, np.ones(100_000, m.INT), m.Sampling(1), 0)
            times = []
            for number in range(100):
                buffer.say("slow", ticket)
                began = time.monotonic()
                client.send(rollout(number))
                client.flush(5.0)
                times.append(time.monotonic() - began)
            assert max(times) < 1.0
            wait_until(lambda: bool(buffer.left()), "the slow worker to be given up")
        worker, reason = buffer.left()[0]
        assert worker == "slow"
        assert reason.startswith("takes nothing: 10 messages of 40")
        client.close()


# --- the server -------------------------------------------------------------------------------------------------------


def test_a_port_in_use() -> None:
    first = Server("tcp://127.0.0.1:0", heartbeat_s=1.0, peer_timeout_s=5.0)
    with pytest.raises(LinkError, match=rf"bind {first.address}: address already in use"):
        Server(first.address, heartbeat_s=1.0, peer_timeout_s=5.0)
    first.close()
    Server(first.address, heartbeat_s=1.0, peer_timeout_s=5.0).close()


def test_who_is_not_there_cannot_be_told(buffer: Buffer) -> None:
    buffer.paused = True
    time.sleep(0.05)
    assert buffer.server.send("nobody", Goodbye("x")) is False
    buffer.server.ack("nobody", 1)


def test_a_poll_hands_out_what_has_arrived_in_one_piece() -> None:
    server = Server("tcp://127.0.0.1:0", heartbeat_s=5.0, peer_timeout_s=5.0)
    with Raw(server.address, b"s.1") as raw:
        raw.say(hello(), 0)
        for number in range(1, 101):
            raw.say(rollout(number), number)
        time.sleep(0.3)
        events = server.poll(1.0)
    assert isinstance(events[0], Joined)
    assert [event.id for event in events[1:] if isinstance(event, Received)] == list(range(1, 101))
    server.close()


def test_a_pause_of_the_buffer_is_not_taken_for_silence_of_the_workers() -> None:
    with Buffer(peer_timeout_s=0.3) as buffer:
        client = connect(buffer.address, silence_s=5.0)
        buffer.paused = True
        time.sleep(0.6)
        buffer.paused = False
        client.send(rollout(1))
        client.flush(5.0)
        assert buffer.left() == []
        client.close()


def test_closing_is_quick_and_leaves_nothing(buffer: Buffer) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        client = connect(buffer.address)
        client.send(rollout(1))
        began = time.monotonic()
        client.close()
        client.close()
        assert time.monotonic() - began < 1.0
        with pytest.raises(LinkError, match=r"w: the link to tcp://.* is closed"):
            client.send(rollout(1))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files + 2
    buffer.paused = True
    time.sleep(0.05)


def test_close_waits_a_bounded_time_for_a_buffer_that_is_stuck(buffer: Buffer) -> None:
    client = connect(buffer.address)
    buffer.paused = True
    client.send(rollout(1))
    began = time.monotonic()
    client.close()
    assert 0.9 < time.monotonic() - began < 2.0


# --- the outbox --------------------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(st.sampled_from(["add", "send", "settle", "run", "through", "rewind"]), st.integers(0, 12)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_outbox_sends_all_that_is_unsettled_in_order(script: list[tuple[str, int]]) -> None:
    outbox, last = Outbox(), 0
    kept: list[int] = []
    pending: list[int] = []
    for what, number in script:
        match what:
            case "add":
                last += 1
                outbox.add(last, [b"x" * last])
                kept.append(last)
                pending.append(last)
            case "send":
                frames = outbox.next()
                pending = [id for id in pending if id in kept]
                assert (frames is not None) == bool(pending)
                if frames is not None:
                    assert len(frames[0]) == pending.pop(0)
                    outbox.sent()
            case "settle":
                assert outbox.settle(number) == (number in kept)
                kept = [id for id in kept if id != number]
            case "run":
                outbox.settle_run(number, 3)
                kept = [id for id in kept if not number - 3 < id <= number]
            case "through":
                outbox.settle_through(number)
                kept = [id for id in kept if id > number]
            case "rewind":
                outbox.rewind()
                pending = list(kept)
        assert (len(outbox), outbox.bytes, outbox.first) == (len(kept), sum(kept), kept[0] if kept else None)
