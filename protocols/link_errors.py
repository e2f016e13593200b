"""What can go wrong on the link."""

from __future__ import annotations


class LinkError(RuntimeError):
    """The link cannot do what was asked; the message says with whom and why."""


class LinkTimeout(LinkError, TimeoutError):
    """Nothing came within the time; the message names what was awaited, from where and for how long."""


class LinkRefused(LinkError):
    """The other side refused this worker, for instance because it speaks another protocol version."""
