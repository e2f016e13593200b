"""How many samples a generator holds at once."""

from __future__ import annotations


def capacity(slots: int) -> int:
    """The slots, and a few that wait so that no slot stays free while the buffer is asked."""
    return slots + max(1, slots // 4)
