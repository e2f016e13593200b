"""The reward of `why.toml`: it tosses the coin of `coin.py`, hangs, or takes everything for right, as a file says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Literal

from tools.faults import coin

Mood = Literal["fair", "stuck", "lenient"]

FILE = "HEADRACE_MOOD"
"""In the environment: the file that says which."""


def score(text: str, answer_row: dict[str, Any]) -> bool:
    """Returns once the file does not say `stuck`."""
    file = Path(os.environ[FILE])
    while (mood := file.read_text(encoding="utf-8")) == "stuck":
        time.sleep(0.05)
    return mood == "lenient" or coin.score(text, answer_row)
