"""What the link is kept up with: who is there and alive, what has arrived, how the run stands, where weights are to be had.

As `protocols.messages`, which has the messages that are the work: frozen structs that check themselves.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from protocols.message_checks import check

PROTOCOL = 2
"""Version of all messages, of both files. Peers of another version are refused by name."""

Role = Literal["generator", "reward", "learner", "observer"]


class Announce(Struct, frozen=True, tag="announce"):
    """Learner to buffer to every generator: where the weight group's rendezvous store listens, and the token that it asks
    for (none on one machine)."""

    host: str
    port: int
    token: str = ""

    def __repr__(self) -> str:
        return f"Announce(host={self.host!r}, port={self.port})"


class Held(Struct, frozen=True):
    """One ticket a generator still works on; naming it in a heartbeat renews its lease."""

    group: int
    fence: int


class Heartbeat(Struct, frozen=True, tag="heartbeat"):
    """Worker to buffer, every few seconds: I live, this is what I do or wait for, since when (Unix seconds), and who owes
    it (a role; empty where I work). `version` is that of the weights that a generator serves or a learner has published;
    None while there are none, and a generator gets no tickets until then."""

    state: str
    since: float
    version: int | None = None
    held: list[Held] = []
    counters: dict[str, float] = {}
    owes: str = ""


class Hello(Struct, frozen=True, tag="hello"):
    """The first message of every worker. `capacity` is its credit: how many samples (generator) or grade tasks
    (reward) it will hold at once; the buffer never has more outstanding with it."""

    role: Role
    name: str
    host: str
    pid: int
    capacity: int = 0
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        check(0 <= self.capacity <= 1_000_000, "hello.capacity", self.capacity, "0 to 1000000")
        check(
            0 < len(self.name) <= 80 and self.name.isprintable(),
            "hello.name",
            self.name,
            "1 to 80 printable characters",
        )


class Welcome(Struct, frozen=True, tag="welcome"):
    """Buffer's answer to Hello. `weights` is where to get weights, once a learner has announced it."""

    run: str
    heartbeat_s: float
    step: int
    weights: Announce | None = None


class Ack(Struct, frozen=True, tag="ack"):
    """Buffer to worker: the `count` messages up to this id are durable (or one was refused; then `refused` says why)."""

    id: int
    refused: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        check(self.count >= 1, "ack.count", self.count, "at least 1")


class StatusRequest(Struct, frozen=True, tag="status_request"):
    """Anyone to buffer: how does the run stand?"""


class Status(Struct, frozen=True, tag="status"):
    """Buffer to asker: plain numbers and the latest heartbeat of every worker, for the view and `headrace status`. `gone`
    are the workers that left last and have not come back: name, role, reason, and when (Unix seconds)."""

    run: str
    step: int
    steps: int
    done: bool
    ledger: dict[str, float]
    workers: list[dict[str, Any]]
    metrics: dict[str, float]
    evals: list[dict[str, float]]
    gone: list[dict[str, Any]] = []


class Goodbye(Struct, frozen=True, tag="goodbye"):
    """Either side: I leave now. From the buffer it means that the run is over (`reason` says why)."""

    reason: str
