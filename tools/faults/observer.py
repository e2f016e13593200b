"""What can be seen of a run from outside: its log, which says what each role has done, and the buffer's own words."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from msgspec import Struct

from protocols.link import Client, LinkError
from protocols.link_messages import Hello, Status, StatusRequest
from protocols.log import Log, LogError
from workers.keys import observer_keys
from workers.roles import role_of

ANSWER_S = 1.0
GENERATED = "generated_tokens"


class Observer:
    """Of one run; `close` it. Everything is None or 0 while there is nothing to see."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._client: Client | None = None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def step(self) -> int:
        """The last committed step."""
        return int(self._first("SELECT coalesce(max(step), 0) FROM steps") or 0)

    def committed_after(self, since: float) -> float | None:
        """When the first step after `since` (Unix seconds) was committed."""
        return self._first("SELECT min(committed_at) FROM steps WHERE committed_at > ?", since)

    def joined_after(self, since: float) -> float | None:
        """When the buffer noted the first worker after `since`."""
        return self._first("SELECT min(at) FROM events WHERE kind = 'joined' AND at > ?", since)

    def worked_after(self, name: str, since: float) -> float | None:
        """When the log has the first work that this role began after `since`: of a generator a response, of a reward a
        grade, of a learner a step."""
        match role_of(name):
            case "generator":
                work = "SELECT min(received_at) FROM rollouts WHERE worker = ?2 AND started_at > ?1"
            case "reward":
                work = "SELECT min(received_at) FROM grades WHERE worker = ?2 AND received_at > ?1"
            case _:
                work = "SELECT min(committed_at) FROM steps WHERE ?2 != '' AND started_at > ?1"
        return self._first(work, since, name)

    def refused_after(self, name: str, since: float) -> int:
        """How many late results of this worker the buffer has refused since then: by their fence, or because their group has
        been decided without them."""
        late = "(detail LIKE '%: fence % is not the current one %' OR detail LIKE '% is not outstanding')"
        sql = f"SELECT count(*) FROM events WHERE kind = 'refused' AND worker = ? AND at > ? AND {late}"
        return int(self._first(sql, name, since) or 0)

    def status(self) -> Status | None:
        """The buffer's answer; None when it does not give one in time."""
        address = self.run_dir / "address"
        try:
            if self._client is not None and self._client.address != address.read_text(encoding="utf-8").strip():
                self.close()
            if self._client is None:
                hello = Hello(role="observer", name=f"chaos-{os.getpid()}", host=socket.gethostname(), pid=os.getpid())
                where, keys = address.read_text(encoding="utf-8").strip(), observer_keys(self.run_dir)
                self._client = Client(where, hello, timeout_s=ANSWER_S, keys=keys)
            return self._client.ask(StatusRequest(), Status, ANSWER_S)
        except (LinkError, OSError):
            return None

    def _first(self, sql: str, *values: object) -> float | None:
        try:
            with Log.open(self.run_dir / "rollouts.db") as log:
                found = log.query(sql, *values)[0][0]
        except LogError:
            return None
        return None if found is None else float(found)


def generated(status: Status | None) -> dict[str, float]:
    """Tokens that each generator has sampled, by name."""
    workers = status.workers if status is not None else []
    return {w["name"]: w.get("counters", {}).get(GENERATED, 0.0) for w in workers if w["role"] == "generator"}


class Seen(Struct, frozen=True):
    """A generator as the buffer last heard of it: tickets in hand, version of its weights, connections to learners; and
    what the buffer itself says: samples issued anew so far, committed step."""

    held: int = 0
    version: int | None = None
    connects: int = 0
    reissued: int = 0
    step: int = 0


def seen(status: Status | None, name: str) -> Seen:
    """All 0 and None when nothing is known."""
    if status is None:
        return Seen()
    worker = next((w for w in status.workers if w["name"] == name), {})
    connects = int(worker.get("counters", {}).get("connects", 0))
    reissued = int(status.ledger.get("total_reissued", 0))
    return Seen(len(worker.get("held", [])), worker.get("version"), connects, reissued, status.step)


def held_back(status: Status | None) -> bool:
    """Whether every generator waits: the lag bound allows nothing more."""
    states = [w["state"] for w in status.workers if w["role"] == "generator"] if status is not None else []
    return bool(states) and all(state.startswith("waits") for state in states)
