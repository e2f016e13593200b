"""What a link's server remembers of each worker that has said hello."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from protocols.link_messages import Ack
from protocols.link_outbox import Outbox


@dataclass(slots=True)
class Peer:
    worker: str
    role: str
    session: bytes
    identity: bytes
    delivered: int
    """The highest id that was handed to the owner, or refused."""
    heard: float
    stream: int = field(default_factory=lambda: 1 + secrets.randbits(62))
    """Tells this stream to the worker from one of an earlier peer or buffer; it goes out as the id of the welcome."""
    last: int = 0
    acked: int = 0
    owed: int = 0
    """How many acknowledgements, of consecutive ids up to `acked`, are to go out as one message."""
    outbox: Outbox = field(default_factory=Outbox)

    def follows(self, id: int) -> bool:
        """Whether an acknowledgement of `id` can go out with those that are owed."""
        return not self.owed or id == self.acked + 1

    def owe(self, id: int) -> None:
        self.acked, self.owed = id, self.owed + 1

    def paid(self) -> Ack | None:
        """The acknowledgements that were owed, as one message."""
        count, self.owed = self.owed, 0
        return Ack(self.acked, count=count) if count else None
