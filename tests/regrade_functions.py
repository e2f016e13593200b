"""Rewards for the tests of regrade; the scorers import this module."""

from __future__ import annotations

from typing import Any


def longer_than_three(text: str, row: dict[str, Any]) -> bool:
    return len(text) > 3


def raises_on_long(text: str, row: dict[str, Any]) -> bool:
    if len(text) > 4:
        raise RuntimeError("too long")
    return text == row["answer"]


def raises(text: str, row: dict[str, Any]) -> bool:
    raise RuntimeError("no such luck")
