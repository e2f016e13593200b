"""Both ends of the link for its tests: a buffer in a thread, the same as a process that may be killed, a worker as a
process, and a TCP proxy between them that breaks.

    python link_peers.py buffer ADDRESS FILE    appends each rollout's number to FILE, on disk before it is acknowledged
    python link_peers.py worker ADDRESS COUNT   sends COUNT rollouts, prints `sent`, waits for the acknowledgements
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from protocols.link import Client, Joined, Left, Received, Server
from protocols.link_messages import Goodbye, Hello, StatusRequest
from protocols.messages import FLOAT, INT, Message, Pull, Rollout


def hello(name: str = "w", **fields: Any) -> Hello:
    return Hello(**{"role": "generator", "name": name, "host": "here", "pid": os.getpid(), **fields})


def rollout(number: int, tokens: int = 3) -> Rollout:
    return Rollout(
        group=number, sample=0, fence=0, tokens=np.full(tokens, number, INT), logprobs=np.zeros(tokens, FLOAT),
        versions=[(0, tokens)], finish="stop", text="", started_at=0.0, finished_at=0.0,
    )  # fmt: skip


def wait_until(done: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.005)


class Buffer:
    """A server in a thread that acknowledges what it gets, unless `refuse` gives a reason; `paused` stops its polls."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", *, heartbeat_s: float = 0.1, **settings: Any) -> None:
        self.server = Server(address, heartbeat_s=heartbeat_s, **{"peer_timeout_s": 5.0, **settings})
        self.address = self.server.address
        self.events: list[Joined | Left | Received] = []
        self.refuse: Callable[[Message], str | None] = lambda message: None
        self.acknowledges = True
        self.paused = False
        self._outbox: list[tuple[str, Message]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def say(self, worker: str, *messages: Message) -> None:
        self._outbox += [(worker, message) for message in messages]

    def received(self, kind: type, worker: str | None = None) -> list[Any]:
        events = [event for event in list(self.events) if isinstance(event, Received)]
        return [e.message for e in events if isinstance(e.message, kind) and worker in (None, e.worker)]

    def groups(self, worker: str | None = None) -> list[int]:
        return [message.group for message in self.received(Rollout, worker)]

    def joined(self) -> list[str]:
        return [event.worker for event in list(self.events) if isinstance(event, Joined)]

    def left(self) -> list[tuple[str, str]]:
        return [(event.worker, event.reason) for event in list(self.events) if isinstance(event, Left)]

    def _run(self) -> None:
        while not self._stop:
            if self.paused:
                time.sleep(0.005)
                continue
            events = self.server.poll(0.005)
            self.events += events
            for event in events:
                if isinstance(event, Received) and event.id and self.acknowledges:
                    self.server.ack(event.worker, event.id, self.refuse(event.message))
            outbox, self._outbox = self._outbox, []
            for worker, message in outbox:
                self.server.send(worker, message)

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join(5.0)
        self.server.close()


class Proxy:
    """Forwards TCP to `target`. `cut` ends all connections, and refuses new ones until `mend`; `swallow` reads and loses
    everything instead, with the connections left open; `freeze` does not even read. A connection that lost something
    never forwards again: no TCP delivers what follows a gap."""

    def __init__(self, target: str) -> None:
        self._target = int(target.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.mode = "forward"
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lossy: set[socket.socket] = set()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self.mode = "cut"

    def swallow(self) -> None:
        self.mode = "swallow"

    def freeze(self) -> None:
        self.mode = "freeze"

    def mend(self) -> None:
        self.mode = "forward"

    def _run(self) -> None:
        while not self._stop:
            mode = self.mode
            if mode == "cut":
                self._end(*self._pairs)
            if mode == "freeze":
                time.sleep(0.005)
                continue
            ready, _, _ = select.select([self._listener, *self._pairs], [], [], 0.005)
            for end in ready:
                if end is self._listener:
                    self._accept(mode)
                elif end in self._pairs:
                    self._forward(end, mode)

    def _accept(self, mode: str) -> None:
        near, _ = self._listener.accept()
        if mode == "cut":
            near.close()
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._target), timeout=1.0)
        except OSError:
            near.close()
            return
        self._pairs |= {near: far, far: near}

    def _forward(self, end: socket.socket, mode: str) -> None:
        try:
            data = end.recv(65536)
            if mode == "swallow":
                self._lossy |= {end, self._pairs[end]}
            if data and end not in self._lossy:
                self._pairs[end].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._end(end)

    def _end(self, *ends: socket.socket) -> None:
        for end in ends:
            other = self._pairs.pop(end, None)
            if other is not None:
                self._pairs.pop(other, None)
                other.close()
                end.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop = True
        self._thread.join(5.0)
        self._end(*self._pairs)
        self._listener.close()


def buffer_process(address: str, path: str) -> None:
    server = Server(address, heartbeat_s=0.1, peer_timeout_s=5.0)
    print(server.address, flush=True)
    with open(path, "a", encoding="utf-8") as file:
        while True:
            received = [event for event in server.poll(0.05) if isinstance(event, Received) and event.id]
            for event in received:
                match event.message:
                    case Rollout(group=group):
                        file.write(f"{group}\n")
                    case Pull():
                        server.send(event.worker, Goodbye("pulled"))
            file.flush()
            os.fsync(file.fileno())
            for event in received:
                server.ack(event.worker, event.id)


def worker_process(address: str, count: int) -> None:
    client = Client(address, hello(f"worker-{os.getpid()}"), timeout_s=10.0, silence_s=1.0)
    for number in range(count):
        client.send(rollout(number))
        if number % 50 == 0:
            time.sleep(0.01)
    print("sent", flush=True)
    client.flush(30.0)
    print("flushed", flush=True)
    with contextlib.suppress(TimeoutError):
        client.ask(StatusRequest(), Goodbye, 60.0)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["buffer", address, path]:
            buffer_process(address, path)
        case ["worker", address, count]:
            worker_process(address, int(count))
