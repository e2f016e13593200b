"""The door before the store: who does not hold the token gets no byte of it.

A TCPStore knows no passwords. With a token it therefore listens on this machine alone, and in its place a gate listens on
the address that subscribers are given; at the other end a passage on the subscriber's own machine leads to the gate. Both
ends prove that they hold the token, which is never sent (SHA-256 HMACs of both sides' random bytes):

    gate to passage     32 random bytes G
    passage to gate     32 random bytes P, HMAC(token, "subscriber" G P)
    gate to passage     HMAC(token, "publisher" G P)

After that bytes are carried as they are: this keeps strangers out, it does not hide from whoever reads the network, and
the process groups' own connections (gloo, NCCL) do not pass here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import socket
import threading
import time
from asyncio import StreamReader, StreamWriter

from engine.weights import control

NONCE, PROOF = 32, 32
HANDSHAKE_S = 10.0
PENDING = 128
"""Connections in the handshake at once; further ones are closed, for strangers must not use up this process's files."""
CHUNK = 1 << 16
LOCAL = "127.0.0.1"


class Denied(Exception):
    """The other end does not hold the token."""


class Relay:
    """Carries connections from a listener to a target in a thread of its own, until `close`. `guards` says at which of
    its two ends the token is asked for: of who comes in (a gate), or of where it leads to (a passage)."""

    def __init__(self, listener: socket.socket, target: tuple[str, int], token: str, *, guards: bool) -> None:
        self._listener, self._target = listener, target
        self._token, self._guards = token.encode(), guards
        self.port: int = listener.getsockname()[1]
        self.denied = 0
        """Connections that did not prove to hold the token."""
        self._pending = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="weights-gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections."""
        with contextlib.suppress(RuntimeError):  # closed already
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5.0)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, sock=self._listener)
        await self._stop.wait()
        server.close()  # the runner cancels what is being carried

    async def _carry(self, near: StreamReader, to_near: StreamWriter) -> None:
        far_end: list[StreamWriter] = []
        try:
            if self._pending >= PENDING:
                return
            self._pending += 1
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    far, to_far = await self._met(near, to_near, far_end)
            finally:
                self._pending -= 1
            ways = [asyncio.create_task(_pump(near, to_far)), asyncio.create_task(_pump(far, to_near))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except (Denied, TimeoutError, asyncio.IncompleteReadError):
            self.denied += 1
        except (OSError, asyncio.CancelledError):
            pass  # the other end is gone, which this one sees as the end of its connection; or this relay closes
        finally:
            for writer in (to_near, *far_end):
                writer.close()

    async def _met(
        self, near: StreamReader, to_near: StreamWriter, far_end: list[StreamWriter]
    ) -> tuple[StreamReader, StreamWriter]:
        """The connection to the target, once the handshake is through."""
        if self._guards:
            await _admit(near, to_near, self._token)
        far, to_far = await asyncio.open_connection(*self._target)
        far_end.append(to_far)
        if not self._guards:
            await _enter(far, to_far, self._token)
        return far, to_far


def open_gate(host: str, port: int, store_port: int, token: str) -> Relay:
    """A gate on `host` before the store on this machine. Raises `OSError` when it cannot listen."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, port), family=family, backlog=1024)
    return Relay(listener, (LOCAL, store_port), token, guards=True)


def open_passage(host: str, port: int, token: str) -> Relay:
    """A way to the gate at `host:port`, from a port of this machine."""
    return Relay(socket.create_server((LOCAL, 0)), (host, port), token, guards=False)


class Entrance:
    """A client of the publisher's store at `host:port`, by way of a passage where a token is asked for."""

    def __init__(self, host: str, port: int, token: str, *, timeout_s: float, given_up: threading.Event) -> None:
        """Waits for the publisher. Raises `ConnectionError` when it does not answer within `timeout_s`, refuses the token, or
        `given_up` is set meanwhile."""
        deadline = time.monotonic() + timeout_s
        control.await_listener(host, port, timeout_s, given_up)
        left = max(1.0, deadline - time.monotonic())
        self._passage = open_passage(host, port, token) if token else None
        if self._passage is None:
            self.store = control.open_store(host, port, left)
            return
        try:
            self.store = control.open_store(LOCAL, self._passage.port, left)
        except ConnectionError as error:
            self._passage.close()
            why = "it refused the token" if self._passage.denied else "no answer"
            raise ConnectionError(f"weights store at {host}:{port}: {why}") from error

    def close(self) -> None:
        if self._passage is not None:
            self._passage.close()


async def _admit(reader: StreamReader, writer: StreamWriter, token: bytes) -> None:
    challenge = secrets.token_bytes(NONCE)
    writer.write(challenge)
    answer = await reader.readexactly(NONCE + PROOF)
    both = challenge + answer[:NONCE]
    if not hmac.compare_digest(answer[NONCE:], _proof(token, b"subscriber", both)):
        raise Denied
    writer.write(_proof(token, b"publisher", both))


async def _enter(reader: StreamReader, writer: StreamWriter, token: bytes) -> None:
    challenge = await reader.readexactly(NONCE)
    mine = secrets.token_bytes(NONCE)
    writer.write(mine + _proof(token, b"subscriber", challenge + mine))
    if not hmac.compare_digest(await reader.readexactly(PROOF), _proof(token, b"publisher", challenge + mine)):
        raise Denied


async def _pump(reader: StreamReader, writer: StreamWriter) -> None:
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()


def _proof(token: bytes, side: bytes, nonces: bytes) -> bytes:
    return hmac.new(token, side + nonces, hashlib.sha256).digest()
