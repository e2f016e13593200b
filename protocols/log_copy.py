"""A log that is made from another one: its groups are copied inside SQLite, not through this process's memory."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from protocols.log import Log
from protocols.log_schema import LogError, uri

_COPIES = {
    "groups": """INSERT INTO main.groups SELECT id, kind, 'waiting', NULL, NULL, task, prompt_id, source_index, samples,
        seed, min_version, prompt_tokens, issued_at FROM source.groups WHERE id IN (SELECT value FROM json_each(?))""",
    "prompts": "INSERT INTO main.prompts SELECT * FROM source.prompts WHERE group_id IN (SELECT value FROM json_each(?))",
    "rollouts": "INSERT INTO main.rollouts SELECT * FROM source.rollouts WHERE group_id IN (SELECT value FROM json_each(?))",
    "grades": "INSERT INTO main.grades SELECT * FROM source.grades WHERE group_id IN (SELECT value FROM json_each(?))",
}


class CopyLog(Log):
    """A log open for writing, and another one beside it that is only read."""

    def attach(self, source: Log) -> None:
        """From now on groups of `source`, which stays open meanwhile, can be copied. Raises `LogError`."""
        how = "mode=ro&immutable=1" if source.still else "mode=ro"
        try:
            self._connection.execute("ATTACH DATABASE ? AS source", (uri(source.path, how),))
        except sqlite3.Error as error:
            raise LogError(f"{source.path}: cannot be read: {error}") from error

    def copy_groups(self, groups: Sequence[int], *, grades: bool) -> None:
        """These groups with prompts and responses, as they were before anything was decided about them; with their grades
        too if asked for. Raises `LogError` when one of them is not in the source or is in this log already."""
        names = json.dumps(list(groups))
        for table, copy in _COPIES.items():
            if table == "grades" and not grades:
                continue
            copied = self._write(copy, (names,), f"{table} of {len(groups)} groups copied from another log")
            if table in ("groups", "prompts") and copied != len(groups):
                raise LogError(
                    f"{self.path}: {copied} of {len(groups)} {table} were copied; the others are not in the source"
                )
