"""Which code made this: the package's version, and the commit where the code lies in a git checkout."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path


@cache
def code_version() -> str:
    """`VERSION` or `VERSION+COMMIT`, for the log's rows and the checkpoints."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return version("headrace")
    return f"{version('headrace')}+{found.stdout.strip()}"
