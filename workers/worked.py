"""What the log says of a role that has ended: whether the run got further by what it did since it was started."""

from __future__ import annotations

from pathlib import Path

from protocols.log import Log, LogError
from workers.roles import role_of

RECENT = 1000
"""So many of the newest responses, and groups, are looked through for work of a generator or a reward."""


def worked(log: Path, name: str, since: float) -> bool:
    """Whether a step was committed and `name` did work of its kind, both after `since` (Unix seconds). A log that cannot
    be read says no."""
    try:
        with Log.open(log) as reader:
            if not _any(reader, "SELECT 1 FROM steps WHERE committed_at >= ?1 ORDER BY step DESC LIMIT 1", since):
                return False
            match role_of(name):
                case "buffer":
                    return True
                case "learner":
                    return _any(reader, "SELECT 1 FROM steps WHERE started_at >= ?1 ORDER BY step DESC LIMIT 1", since)
                case "generator":
                    return _any(
                        reader,
                        f"""SELECT 1 FROM (SELECT worker, started_at FROM rollouts ORDER BY id DESC LIMIT {RECENT})
                        WHERE worker = ?2 AND started_at >= ?1 LIMIT 1""",
                        since,
                        name,
                    )
                case "reward":
                    return _any(
                        reader,
                        f"""SELECT 1 FROM grades WHERE group_id > (SELECT max(id) FROM groups) - {RECENT}
                        AND worker = ?2 AND received_at >= ?1 LIMIT 1""",
                        since,
                        name,
                    )
    except LogError:
        return False
    return False


def _any(log: Log, sql: str, *values: object) -> bool:
    return bool(log.query(sql, *values))
