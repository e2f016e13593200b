"""What every section of a config shares."""

from __future__ import annotations

from msgspec import Struct


class ConfigError(ValueError):
    """A config that cannot run; names the file, the key, what it got and what it expected."""


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the TOML file: unknown keys are refused."""
