"""Closed to strangers: keys on real sockets, rights of roles, the token before the weights' store."""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq
from link_peers import Buffer, hello, rollout, wait_until

from engine.weights import Publisher, Subscriber, Terms
from engine.weights.gate import LOCAL
from protocols import messages as m
from protocols.codec import encode
from protocols.link import Client, KeysError, LinkRefused, LinkTimeout, Server, WorkerKeys
from protocols.link_keys import ROLES, is_local, make_keys, read_buffer_keys, read_worker_keys
from protocols.link_messages import Ack, Announce, Welcome
from protocols.link_rights import SAID_BY

TOKEN = "a token that is handed out over the link"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "keys"
    make_keys(folder)
    return folder


@pytest.fixture
def buffer(keys: Path) -> Iterator[Buffer]:
    with Buffer(keys=read_buffer_keys(keys)) as buffer:
        yield buffer


def connect(buffer: Buffer, keys: WorkerKeys | None, timeout_s: float = 20.0, **fields: str) -> Client:
    return Client(buffer.address, hello(**fields), timeout_s=timeout_s, keys=keys)


def test_files_are_private_and_made_once(keys: Path, tmp_path: Path) -> None:
    names = {path.name for path in keys.iterdir()}
    assert names == {"buffer.key", *(f"{role}.key" for role in ROLES)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()} == {0o600}
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    with pytest.raises(KeysError, match="it holds files already"):
        make_keys(keys)
    secrets = [read_buffer_keys(keys).secret, *(read_worker_keys(keys, role).secret for role in ROLES)]
    assert len(set(secrets)) == 1 + len(ROLES)
    assert not any(secret in text for secret in secrets for text in (repr(read_buffer_keys(keys)), str(Announce)))
    assert "secret" not in repr(read_worker_keys(keys, "learner"))
    open_to_all = tmp_path / "generator.key"
    open_to_all.write_text((keys / "generator.key").read_text(encoding="utf-8"), encoding="utf-8")
    open_to_all.chmod(0o644)
    with pytest.raises(KeysError, match="others may read it"):
        read_worker_keys(tmp_path, "generator")
    with pytest.raises(KeysError, match=r"reward\.key: No such file"):
        read_worker_keys(tmp_path, "reward")


def test_the_right_key_works_both_ways(buffer: Buffer, keys: Path) -> None:
    client = connect(buffer, read_worker_keys(keys, "generator"))
    for number in range(50):
        client.send(rollout(number))
    client.flush(20.0)
    assert buffer.groups() == list(range(50))
    buffer.say("w", m.Pull(1, []))
    assert client.receive(20.0) == m.Pull(1, [])
    client.close()


def test_an_unknown_key_gets_nothing_and_is_told(buffer: Buffer, keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "others")
    theirs = read_worker_keys(tmp_path / "others", "generator")
    known = read_buffer_keys(keys).public
    began = time.monotonic()
    with pytest.raises(LinkRefused, match="it does not know this worker's key"):
        connect(buffer, WorkerKeys(theirs.role, theirs.public, theirs.secret, known))
    assert time.monotonic() - began < 15.0, "it need not wait for its timeout"
    with pytest.raises(LinkTimeout, match="it has no keys, or others than this worker's file says"):
        connect(buffer, theirs, timeout_s=1.5)
    with pytest.raises(LinkTimeout, match="it may want keys, and this worker has none"):
        connect(buffer, None, timeout_s=1.5)
    assert buffer.events == []
    assert buffer.server.counters["denied"] >= 1
    assert buffer.server.counters["messages"] == 0


def test_a_buffer_without_keys_is_named(keys: Path) -> None:
    with Buffer() as open_buffer, pytest.raises(LinkTimeout, match="it has no keys, or others than"):
        connect(open_buffer, read_worker_keys(keys, "generator"), timeout_s=1.5)


def test_a_key_acts_in_its_own_role_only(buffer: Buffer, keys: Path) -> None:
    learner = connect(buffer, read_worker_keys(keys, "learner"), name="learner-0", role="learner")
    with pytest.raises(LinkRefused, match="role: got learner, but the key of w is that of a generator"):
        connect(buffer, read_worker_keys(keys, "generator"), role="learner")
    with pytest.raises(LinkRefused, match="role: got generator, but learner-0 is a learner here"):
        connect(buffer, read_worker_keys(keys, "generator"), name="learner-0")
    generator = connect(buffer, read_worker_keys(keys, "generator"))
    id = generator.send(m.StepCommit(1, "hash", "code", 0.0, 0.0, {}))
    refused = generator.receive(20.0)
    assert isinstance(refused, Ack)
    assert refused.id == id
    assert re.match("kind: got 'step_commit', expected one of", str(refused.refused))
    learner.send(m.PlanRequest(1))
    learner.flush(20.0)
    assert buffer.received(m.StepCommit) == []
    assert buffer.received(m.PlanRequest, "learner-0") == [m.PlanRequest(1)]
    assert buffer.left() == [], "the learner was not replaced"
    for client in (learner, generator):
        client.close()


def test_a_session_of_another_role_cannot_be_taken_over(buffer: Buffer, keys: Path) -> None:
    """Even by who has learnt its secret name."""
    learner = connect(buffer, read_worker_keys(keys, "learner"), name="learner-0", role="learner")
    session = next(iter(buffer.server._sessions))
    mine = read_worker_keys(keys, "generator")
    context = zmq.Context()
    try:
        raw = context.socket(zmq.DEALER)
        raw.linger = 0
        raw.curve_publickey, raw.curve_secretkey = mine.public.encode(), mine.secret.encode()
        raw.curve_serverkey = mine.buffer.encode()
        raw.setsockopt(zmq.IDENTITY, session + b".99")
        raw.connect(buffer.address)
        for message in (hello("learner-0", role="learner"), m.StepCommit(1, "h", "c", 0.0, 0.0, {}), rollout(1)):
            raw.send_multipart(encode(message, 1 << 50))
        wait_until(
            lambda: buffer.server.counters["not_admitted"] + buffer.server.counters["malformed_kind"] >= 2, "both"
        )
        time.sleep(0.2)
    finally:
        context.destroy(linger=0)
    assert not [event for event in buffer.events if getattr(event, "id", 0)]
    learner.send(m.PlanRequest(2))
    learner.flush(20.0)
    learner.close()


def test_only_generators_learn_where_weights_are(buffer: Buffer, keys: Path) -> None:
    where = Announce("10.0.0.1", 5, TOKEN)
    buffer.server.welcome = Welcome(run="r", heartbeat_s=0.1, step=0, weights=where)
    for role in ROLES:
        client = connect(buffer, read_worker_keys(keys, role), name=role, role=role)
        assert client.welcome.weights == (where if role == "generator" else None)
        client.close()
    assert TOKEN not in repr(buffer.server.welcome)


def test_every_role_has_its_rights() -> None:
    assert set(SAID_BY) == set(ROLES)
    assert not SAID_BY["observer"] & {
        "rollout",
        "hand_back",
        "grade",
        "plan_request",
        "pull",
        "step_commit",
        "announce",
    }


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://10.1.2.3:5555", "tcp://[::]:*", "tcp://eth0:*"]
)
def test_beyond_this_machine_only_with_keys(address: str) -> None:
    with pytest.raises(KeysError, match=r"beyond this machine, and there are no keys; make them with `headrace keygen"):
        Server(address, heartbeat_s=1.0, peer_timeout_s=5.0)
    with pytest.raises(KeysError, match="beyond this machine"):
        Client(address, hello(), timeout_s=1.0)


def test_what_counts_as_this_machine() -> None:
    local = ["tcp://127.0.0.2:5", "tcp://localhost:*", "tcp://[::1]:5", "ipc:///tmp/x", "inproc://x"]
    assert all(map(is_local, local))
    assert not any(
        map(is_local, ["tcp://127.0.0.1.example.org:5", "tcp://box:5", "udp://127.0.0.1:5", "tcp://[::ffff:1.2.3.4]:5"])
    )


# --- the token -------------------------------------------------------------------------------------------------------


def test_weights_flow_to_who_has_the_token() -> None:
    with Publisher(LOCAL, Terms(peer_timeout_s=10.0), token=TOKEN) as publisher:
        publisher.publish(1, {"w": torch.arange(1000)})
        with Subscriber(*publisher.address, name="a", timeout_s=10.0, token=TOKEN) as subscriber:
            for version in (1, 2):
                with subscriber.wait(20.0) as update:
                    assert (update.version, int(update.tensors["w"].sum())) == (version, 499500 * version)
                if version == 1:
                    publisher.publish(2, {"w": torch.arange(1000) * 2})
        wait_until(lambda: not publisher.members, "it to leave")


def test_strangers_get_no_byte_of_the_store() -> None:
    with Publisher(LOCAL, Terms(peer_timeout_s=10.0), token=TOKEN) as publisher:
        publisher.publish(1, {"w": torch.arange(10)})
        with pytest.raises(ConnectionError, match="it refused the token"):
            Subscriber(*publisher.address, name="stranger", timeout_s=1.0, token="another")
        with socket.create_connection(publisher.address, timeout=15.0) as raw:
            challenge = raw.recv(1000)
            assert len(challenge) == 32
            raw.sendall(os.urandom(64))
            assert raw.recv(1000) == b"", "wrong proof: closed"
        with pytest.raises(ConnectionError, match="no answer within"):
            Subscriber(*publisher.address, name="stranger", timeout_s=1.0)
        assert publisher.members == {}
        with Subscriber(*publisher.address, name="a", timeout_s=10.0, token=TOKEN) as subscriber:
            subscriber.wait(20.0).release()
