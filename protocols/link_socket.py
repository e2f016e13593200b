"""The pipe under the link: how both ends open their socket, and the few words that both must agree on."""

from __future__ import annotations

import zmq

from protocols.link_keys import BufferKeys, WorkerKeys

MAX_MESSAGE_BYTES = 1 << 30
"""A longer message is refused, and a longer frame ends the connection before it is stored."""
HELLO_FIRST = "say hello first"
"""The refusal that makes a client introduce itself anew: this buffer does not know it (any more)."""
ZAP_DOMAIN = b"headrace"
QUEUED = 1000
"""Messages that ZeroMQ holds for one peer; what does not fit waits in our own queues, which are bounded in bytes."""


def open_socket(
    context: zmq.Context,
    kind: int,
    address: str,
    *,
    max_message_bytes: int,
    keys: BufferKeys | WorkerKeys | None = None,
) -> zmq.Socket:
    """A socket for `address`, neither bound nor connected yet. Closing it never waits. With keys it speaks CURVE, and with
    nobody who does not."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set_hwm(QUEUED)
    if "[" in address:
        socket.setsockopt(zmq.IPV6, 1)
    if keys is not None:
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        if isinstance(keys, BufferKeys):
            socket.curve_server = True
            socket.zap_domain = ZAP_DOMAIN
        else:
            socket.curve_serverkey = keys.buffer.encode()
    return socket


def session_of(identity: bytes) -> bytes:
    """A client's identity is SESSION.N: the session lasts as long as the client, N counts its connections."""
    return identity.partition(b".")[0]
