"""Who may connect: answers ZeroMQ's questions about keys (ZAP, https://rfc.zeromq.org/spec/27).

libzmq asks over an in-process socket in the middle of each CURVE handshake, and lets nobody in before the answer. What is
answered comes back as the `User-Id` of every message of that connection: here the role whose key it is.
"""

from __future__ import annotations

from collections import Counter

import zmq
from zmq.utils import z85

from protocols.link_keys import BufferKeys
from protocols.link_socket import ZAP_DOMAIN

ENDPOINT, VERSION = "inproc://zeromq.zap.01", b"1.0"
AT_ONCE = 256
"""Questions answered in one turn at most: strangers who knock must not keep the buffer from its work."""


class Doorman:
    """Of one context; make it before the socket binds, for without it libzmq lets everybody in."""

    def __init__(self, context: zmq.Context, keys: BufferKeys, counters: Counter[str]) -> None:
        self._roles = {z85.decode(key): role for role, key in keys.roles.items()}
        self._counters = counters
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def answer(self) -> None:
        """All questions that wait, without waiting."""
        for _ in range(AT_ONCE):
            try:
                version, request, domain, _, _, mechanism, *credentials = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            known = (version, domain, mechanism) == (VERSION, ZAP_DOMAIN, b"CURVE") and len(credentials) == 1
            role = self._roles.get(credentials[0]) if known else None
            self._counters["admitted" if role else "denied"] += 1
            verdict = (b"200", b"OK", role.encode()) if role else (b"400", b"unknown key", b"")
            self.socket.send_multipart([VERSION, request, *verdict, b""])

    def close(self) -> None:
        self.socket.close()


def role_of_key(frame: zmq.Frame) -> str:
    """The role whose key the sender of this frame has proven to hold."""
    return str(frame.get("User-Id"))
