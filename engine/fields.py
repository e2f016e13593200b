"""Fields of JSON rows: reading .jsonl files, finding a field by its path, filling in format strings."""

from __future__ import annotations

import gzip
import json
import re
import string
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.config import ConfigError


class TaskError(ConfigError):
    """Task data that cannot be used; names the file and line (or the data set), the field, what it got and expected."""


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", fields) of every line of a .jsonl or .jsonl.gz file that is not blank. Raises `TaskError`."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _decode(f"{path}:{number}", line)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise TaskError(f"{path}:{number + 1}: broken gzip data: {error}") from error


def _decode(where: str, line: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{where}: not JSON: {error}; got {line.strip()[:80].decode(errors='replace')!r}") from error
    if not isinstance(fields, dict):
        raise TaskError(f"{where}: got {_shown(fields)}, expected a JSON object")
    return fields


_PART = re.compile(r"[^.\[\]]+")


def field_at(where: str, fields: Mapping[str, Any], path: str) -> Any:
    """The value at `a`, `a.b`, `a[b]` or `a[0]`. Raises `TaskError` naming `where` if there is none or it is null."""
    value: Any = fields
    for part in _PART.findall(path) or [path]:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            got = f"the fields {', '.join(value)}" if isinstance(value, dict) else _shown(value)
            raise TaskError(f"{where}: no field {path!r}: got {got}, expected {part!r}")
    if value is None:
        raise TaskError(f"{where}: {path}: got null, expected a value")
    return value


class Format:
    """A format string over a row's fields, as `str.format` writes it (`{{` for a brace, `{x:.2f}` for a number), with
    paths of `field_at` for names. Lists and objects are filled in as JSON."""

    def __init__(self, text: str, what: str) -> None:
        """`what` names the string in errors. Raises `TaskError` for a broken one."""
        self.text, self.what = text, what
        try:
            self._parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise TaskError(f"{what} = {text!r}: not a format string: {error}") from error
        for _, field, _, conversion in self._parts:
            if field == "" or conversion:
                raise TaskError(f"{what} = {text!r}: expected field names in braces, as in {{question}} or {{a[b]}}")

    def fill(self, where: str, fields: Mapping[str, Any]) -> str:
        """The text for one row. Raises `TaskError` naming `where` for a missing field or one the format does not fit."""
        filled = []
        for literal, field, spec, _ in self._parts:
            filled.append(literal)
            if field is None:
                continue
            value = field_at(where, fields, field)
            try:
                filled.append(_shown(value) if isinstance(value, dict | list) else format(value, spec or ""))
            except (TypeError, ValueError) as error:
                raise TaskError(
                    f"{where}: {self.what} = {self.text!r}: {field} is {_shown(value)[:80]}: {error}"
                ) from error
        return "".join(filled)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
