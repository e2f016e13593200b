"""Feeds a real server on loopback: malformed messages over ZeroMQ's own sockets while a worker goes on beside them, then
bytes that are not even ZeroMQ's protocol, frames that never end, and frames that promise 4 GiB."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import zmq

from protocols import messages as m
from protocols.link import Client, LinkError, Received, Server
from protocols.link_keys import BufferKeys, make_keys, read_buffer_keys
from protocols.link_messages import Hello
from protocols.link_server import STRIKES
from tools.fuzzing.codec import Found, Memory
from tools.fuzzing.mutate import Mutator
from tools.fuzzing.samples import frames_of_samples

PEER_TIMEOUT_S = 2.0
CUT_OFF_S = 10.0
"""Twice the server's timeout is what it takes; the rest is for a machine that is busy."""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
CLAIM = b"\x02" + (4 << 30).to_bytes(8, "big")
"""A long frame of 4 GiB, by its header."""
UNFINISHED = b"\x02" + (1 << 20).to_bytes(8, "big") + b"half of it" * 100
WAIT_S = 30.0


class Target:
    """A server that polls in a thread and acknowledges what it gets; `error` is what it died of."""

    def __init__(self, keys: BufferKeys | None = None) -> None:
        self.server = Server("tcp://127.0.0.1:0", heartbeat_s=0.2, peer_timeout_s=PEER_TIMEOUT_S, keys=keys)
        self.heard: list[int] = []
        self.error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                for event in self.server.poll(0.01):
                    if isinstance(event, Received) and event.id:
                        self.server.ack(event.worker, event.id)
                        if event.worker == "worker" and isinstance(event.message, m.Rollout):
                            self.heard.append(event.message.group)
        except Exception as error:  # what a fuzzer is there to find
            self.error = error

    def close(self) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)
        self.server.close()


def fuzz_link(malformed: int, seed: int, raw: int) -> Found:
    """Until `malformed` messages were refused or ignored by the server, then `raw` connections of garbage of each kind,
    to this server and to one with keys."""
    with tempfile.TemporaryDirectory(prefix="headrace-fuzz-") as folder:
        make_keys(Path(folder) / "keys")
        found, target, keyed = Found(), Target(), Target(read_buffer_keys(Path(folder) / "keys"))
    worker = Client(
        target.server.address, Hello("generator", "worker", "host", os.getpid()), timeout_s=WAIT_S, silence_s=WAIT_S
    )
    began, memory = time.perf_counter(), Memory()
    sent = 0
    try:
        mutator = Mutator(frames_of_samples(), seed)
        while _bad(target.server) < malformed and target.error is None:
            found.messages += _one_connection(target, mutator, random.Random(seed + sent))
            worker.send(_rollout(sent))
            sent += 1
            if found.messages > malformed // 50 and not found.outcomes["warm"]:
                memory, found.outcomes["warm"] = Memory(), 1
            found.growth_mib = memory.look()
        found.seconds = time.perf_counter() - began
        _garbage(target.server.address, random.Random(seed), raw, found, keyed=False)
        _garbage(keyed.server.address, random.Random(seed), raw, found, keyed=True)
        found.growth_mib = max(found.growth_mib, memory.look())
        worker.flush(WAIT_S)
    except LinkError as disturbed:
        found.violations.append(f"link: the worker beside was disturbed: {disturbed}")
    finally:
        worker.close()
        target.close()
        keyed.close()
    del found.outcomes["warm"]
    found.outcomes.update({f"link: {name}": count for name, count in target.server.counters.items()})
    if (error := target.error or keyed.error) is not None:
        found.violations.append(f"link: the server died of {error!r}")
    elif keyed.server.counters["messages"]:
        found.violations.append(f"link: strangers said {keyed.server.counters} to a server with keys")
    elif target.heard != list(range(sent)):
        found.violations.append(f"link: of {sent} messages of the worker beside {len(target.heard)} arrived")
    return found


def _bad(server: Server) -> int:
    return sum(n for name, n in list(server.counters.items()) if name.startswith("malformed") or name == "ignored")


def _one_connection(target: Target, mutator: Mutator, chance: random.Random) -> int:
    """Messages until the server stops listening to this one; every other time after a proper hello. How many went out."""
    context = zmq.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.sndtimeo = int(WAIT_S * 1000)
        dealer.connect(target.server.address)
        if chance.random() < 0.5:
            dealer.send_multipart(frames_of_samples()[12])
        before = target.server.counters["messages"]
        count = chance.randint(STRIKES // 2, 4 * STRIKES)
        for _ in range(count):
            dealer.send_multipart(mutator.next() or [b""])
        deadline = time.monotonic() + WAIT_S
        while target.server.counters["messages"] < before + count and time.monotonic() < deadline:
            if target.error is not None:
                break
            time.sleep(0.0005)
        return count
    finally:
        context.destroy(linger=0)


def _rollout(number: int) -> m.Rollout:
    tokens = np.arange(3, dtype=m.INT)
    return m.Rollout(number, 0, 0, tokens, np.zeros(3, m.FLOAT), [(0, 3)], "stop", "", 0.0, 0.0)


def _garbage(address: str, chance: random.Random, count: int, found: Found, *, keyed: bool) -> None:
    """Raw TCP: the server must end each connection. Without keys, libzmq takes what does not begin like a greeting for
    ZeroMQ 2's protocol, which has neither handshake nor heartbeat: such a connection may stay, and says nothing."""
    where = (urlsplit(address).hostname, urlsplit(address).port)
    for number in range(count):
        kinds = {
            "random bytes": chance.randbytes(chance.randint(1, 4096)),
            "half a greeting": GREETING[: chance.randint(1, 63)],
            "garbage after the greeting": GREETING + chance.randbytes(chance.randint(1, 4096)),
            "garbage after the handshake": GREETING + READY + b"\x07" + chance.randbytes(64),
            "4 GiB claimed": GREETING + READY + CLAIM + b"x" * 1000,
            "unfinished frame": GREETING + READY + UNFINISHED,
        }
        ends = [(kind, _said(where, data)) for kind, data in kinds.items()]
        for kind, end in ends:
            cut = _ended(end)
            found.outcomes[f"raw, {'with' if keyed else 'no'} keys, {kind}: {'cut off' if cut else 'stays open'}"] += 1
            if not cut and (keyed or kind != "random bytes"):
                found.violations.append(f"link: raw {kind} (number {number}) was not cut off within {CUT_OFF_S} s")


def _said(where: tuple[str | None, int | None], data: bytes) -> socket.socket:
    end = socket.create_connection(where, timeout=WAIT_S)
    with contextlib.suppress(OSError):  # cut off already
        end.sendall(data)
    return end


def _ended(end: socket.socket) -> bool:
    """Whether the other side ends this connection in time; what it says before (a greeting) does not matter."""
    deadline = time.monotonic() + CUT_OFF_S
    with end:
        try:
            while (left := deadline - time.monotonic()) > 0:
                end.settimeout(left)
                if not end.recv(65536):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False
