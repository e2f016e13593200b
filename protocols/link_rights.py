"""Who may say what to the buffer: the kinds (tags) of messages that each role sends. Anything else is refused before its
body is looked at."""

from __future__ import annotations

_ALL = frozenset({"hello", "heartbeat", "ack", "status_request", "goodbye"})

SAID_BY: dict[str, frozenset[str]] = {
    "generator": _ALL | {"rollout", "hand_back"},
    "reward": _ALL | {"grade"},
    "learner": _ALL | {"plan_request", "pull", "step_commit", "announce"},
    "observer": _ALL,
}
FROM_WORKERS = frozenset().union(*SAID_BY.values())
"""What somebody may say whose role is not known: his hello, or what a buffer that was started anew has to refuse."""
