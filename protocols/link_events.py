"""What a link's server tells its owner."""

from __future__ import annotations

from msgspec import Struct

from protocols.link_messages import Hello
from protocols.messages import Message


class Joined(Struct, frozen=True):
    """A worker said hello. Said again by a worker that never left, it means that the connection was made anew; what was
    sent to it is then on its way again, without the owner."""

    worker: str
    hello: Hello


class Received(Struct, frozen=True):
    """A message; acknowledge its id once what it says is durable (id 0, a heartbeat or status request, wants none)."""

    worker: str
    id: int
    message: Message


class Left(Struct, frozen=True):
    """A worker is gone: it said goodbye, was replaced, was silent for too long, took nothing or sent garbage."""

    worker: str
    reason: str


Event = Joined | Received | Left
