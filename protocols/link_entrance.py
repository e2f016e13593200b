"""Where all connections of the link come in: the buffer's bound socket and, with keys, the doorman beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import zmq

from protocols.codec import Frame
from protocols.link_doorman import Doorman, role_of_key
from protocols.link_errors import LinkError
from protocols.link_keys import BufferKeys, require_keys
from protocols.link_socket import open_socket


class Entrance:
    """Binds at once; `address` names the port that port 0 came to. One thread only."""

    def __init__(
        self,
        address: str,
        *,
        peer_timeout_s: float,
        max_message_bytes: int,
        keys: BufferKeys | None,
        counters: Counter[str],
    ) -> None:
        """Raises `LinkError` when the address cannot be bound, `KeysError` when it reaches beyond this machine and there
        are no keys. `counters` get what the doorman admits and denies."""
        require_keys(keys, address, "bind")
        self._context = zmq.Context()
        self._doorman = None if keys is None else Doorman(self._context, keys, counters)
        self._socket = open_socket(self._context, zmq.ROUTER, address, max_message_bytes=max_message_bytes, keys=keys)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        for option in (zmq.HANDSHAKE_IVL, zmq.HEARTBEAT_IVL, zmq.HEARTBEAT_TIMEOUT):
            # Ends connections that say nothing or leave a frame unfinished; the protocol above covers what that loses.
            self._socket.setsockopt(option, int(peer_timeout_s * 1000))
        self._poller = zmq.Poller()
        for end in (self._socket, self._doorman and self._doorman.socket):
            if end is not None:
                self._poller.register(end, zmq.POLLIN)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise LinkError(f"bind {address}: {str(error.strerror or error).lower()}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def wait(self, timeout_s: float) -> bool:
        """Whether a message has come, within so long; who knocks meanwhile is answered."""
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._doorman is not None:
            self._doorman.answer()
        return self._socket in ready

    def receive(self) -> tuple[bytes, str | None, Sequence[Frame]]:
        """The next message: whose connection, the role whose key it was made with (None: without keys), and its frames.
        Raises `zmq.Again` when none is there."""
        if self._doorman is None:
            identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            return identity, None, frames
        first, *parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        return first.bytes, role_of_key(first), [part.buffer for part in parts]

    def send(self, identity: bytes, frames: Sequence[Frame], *, copy: bool) -> None:
        """Sends over a connection at once. Raises `zmq.ZMQError`: EAGAIN when its pipe is full, EHOSTUNREACH when it is gone."""
        self._socket.send_multipart([identity, *frames], zmq.NOBLOCK, copy=copy)

    def close(self) -> None:
        """At once; what has not left is lost."""
        self._socket.close()
        if self._doorman is not None:
            self._doorman.close()
        self._context.term()
