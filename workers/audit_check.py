"""What an audit's checks have in common: the log with its configs, and how a check says what it found."""

from __future__ import annotations

import json
from typing import Any, Self

from msgspec import Struct

from protocols.log import Log


class Check(Struct):
    """What was looked at, in words with numbers, and what is wrong."""

    counted: str
    violations: list[str]
    name: str = ""


class Audited(Struct, frozen=True):
    """A log, and the settings that its rows are judged by: those of every step, and those that the run goes on with.

    `copied` is how the log was made from another one ("replay" or "regrade"), or empty: such a log has no events of the
    workers whose results it holds.
    """

    log: Log
    config: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    last: int
    copied: str

    @classmethod
    def of(cls, log: Log) -> Self:
        meta = log.meta
        configs = {str(id): json.loads(text) for id, text in log.query("SELECT id, config FROM configs")}
        return cls(log, meta.config, configs, log.last_step(), meta.origin.how if meta.origin is not None else "")

    def setting(self, config: dict[str, Any], section: str, key: str, default: Any) -> Any:
        """A value that a config need not name."""
        return (config.get(section) or {}).get(key, default)

    def least(self, section: str, key: str, default: Any) -> Any:
        """The smallest value that the run has ever had of a setting."""
        return min(self.setting(config, section, key, default) for config in (self.config, *self.configs.values()))

    def switched_off(self, section: str, key: str, default: bool) -> bool:
        """Whether the run has ever had this setting off."""
        return not all(self.setting(config, section, key, default) for config in (self.config, *self.configs.values()))


def each(rows: list[tuple[Any, ...]], text: str) -> list[str]:
    """One violation a row, its columns put into `text`."""
    return [text.format(*row) for row in rows]
