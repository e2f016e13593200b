"""Why a role must not be started again, told to the launcher in memory.

A role's log is a file on the run's own file system, so a role that ends because that is full could not say so there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3

KEY = "HEADRACE_LAST_WORDS"
"""Environment variable with the path of the file in memory; inherited by everything below a role, torchrun's ranks too."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RUST = re.compile(rf"os error ({'|'.join(str(number) for number in sorted(NO_SPACE))})\b")
_LIMIT = 8192


class LastWords:
    """The launcher's side: a file in this process's memory, which its children find by `path`."""

    def __init__(self) -> None:
        self._file = os.memfd_create("headrace-last-words")

    @property
    def path(self) -> str:
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def read(self) -> str:
        return os.pread(self._file, _LIMIT, 0).decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self._file)


def say_last_words(text: str) -> None:
    """The role's side; does nothing where no launcher listens."""
    path = os.environ.get(KEY)
    if path is not None:
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def out_of_space(error: BaseException) -> bool:
    """Whether an error, or what it came from, is a file system, a quota or a file that may not grow."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return True
        if isinstance(cause, sqlite3.Error) and getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return True
        if _RUST.search(str(cause)):  # libraries in Rust (safetensors) tell it in their text only
            return True
        cause = cause.__cause__ or cause.__context__
    return False
