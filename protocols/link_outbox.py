"""One direction of the link as plain data: what was said, what of it went out, and what the other side has."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from protocols.codec import Frame


class Outbox:
    """Messages in the order of their ids, kept until they are settled. No I/O; `bytes` is what is kept."""

    def __init__(self) -> None:
        self._kept: dict[int, list[Frame]] = {}
        self._unsent: deque[int] = deque()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def first(self) -> int | None:
        """The lowest id that is not settled."""
        return next(iter(self._kept), None)

    def add(self, id: int, frames: list[Frame]) -> None:
        """Ids must rise; they need not be without gaps."""
        self._kept[id] = frames
        self._unsent.append(id)
        self.bytes += size_of(frames)

    def next(self) -> list[Frame] | None:
        """The frames to send next; None when everything went out. They stay next until `sent`."""
        while self._unsent:
            frames = self._kept.get(self._unsent[0])
            if frames is not None:
                return frames
            self._unsent.popleft()  # settled before it went out (again)
        return None

    def sent(self) -> None:
        """What `next` gave went out."""
        self._unsent.popleft()

    def rewind(self) -> None:
        """The connection is a new one: everything that is not settled goes out again."""
        self._unsent = deque(self._kept)

    def settle(self, id: int) -> bool:
        """The other side has `id`; False when it is not kept (any more)."""
        frames = self._kept.pop(id, None)
        if frames is None:
            return False
        self.bytes -= size_of(frames)
        return True

    def settle_run(self, last: int, count: int) -> None:
        """The other side has the `count` ids up to `last`; those that are not kept do not matter."""
        if self._kept:
            lowest, highest = next(iter(self._kept)), next(reversed(self._kept))
            for id in range(max(last - count + 1, lowest), min(last, highest) + 1):
                self.settle(id)

    def settle_through(self, id: int) -> None:
        """The other side has everything up to `id`."""
        while self._kept and (first := next(iter(self._kept))) <= id:
            self.settle(first)


def size_of(frames: Sequence[Frame]) -> int:
    """Bytes of a message on the wire, ZeroMQ's own few left out."""
    return sum(map(len, frames))
