"""The reward of `chaos.toml`: half of all texts are right, for each prompt others, so that about every group is
informative, whoever wrote it."""

from __future__ import annotations

from typing import Any

import xxhash


def score(text: str, answer_row: dict[str, Any]) -> bool:
    """The same for the same text, in every process."""
    return xxhash.xxh3_64_intdigest(f"{answer_row['answer']} {text}".encode()) % 2 == 0
