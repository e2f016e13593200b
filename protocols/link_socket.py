"""The pipe under the link: how both ends open their socket, and the few words that both must agree on."""

from __future__ import annotations

import zmq

MAX_MESSAGE_BYTES = 1 << 30
"""A longer message is refused, and a longer frame ends the connection before it is stored."""
HELLO_FIRST = "say hello first"
"""The refusal that makes a client introduce itself anew: this buffer does not know it (any more)."""
QUEUED = 1000
"""Messages that ZeroMQ holds for one peer; what does not fit waits in our own queues, which are bounded in bytes."""


def open_socket(context: zmq.Context, kind: int, address: str, *, max_message_bytes: int) -> zmq.Socket:
    """A socket for `address`, neither bound nor connected yet. Closing it never waits.

    Whoever adds keys (CURVE) for addresses beyond this machine sets them here, the one place both ends pass.
    """
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set_hwm(QUEUED)
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)
    return socket


def session_of(identity: bytes) -> bytes:
    """A client's identity is SESSION.N: the session lasts as long as the client, N counts its connections."""
    return identity.partition(b".")[0]
