"""One line about how far a long command is, on a terminal always the same one."""

from __future__ import annotations

import sys
import time
from typing import Self

from workers.lines import duration

TERMINAL_S, PLAIN_S = 0.2, 5.0
"""How often the line is written: where it is overwritten, and where lines pile up."""


class Progress:
    """Counts from `start` to `last`; `what` is what happens to a step (or whatever is counted, `unit`)."""

    def __init__(self, start: int, last: int, what: str, *, unit: str = "step", quiet: bool = False) -> None:
        self.start, self.last, self.what, self.unit, self.quiet = start, last, what, unit, quiet
        self.terminal = sys.stderr.isatty()
        self.began = self.said = time.monotonic()
        self.open = False

    def step(self, at: int) -> None:
        """`at` of `last` is done."""
        now = time.monotonic()
        if self.quiet or now - self.said < (TERMINAL_S if self.terminal else PLAIN_S):
            return
        self.said = now
        rate = (at - self.start) / (now - self.began)
        left = duration((self.last - at) / rate) if rate else "?"
        line = f"{self.unit} {at} of {self.last} {self.what}, {rate:.2f} {self.unit}s/s, {left} left"
        print(
            f"\r\x1b[K{line}" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )
        self.open = self.terminal

    def end(self) -> None:
        """What is printed next starts on a line of its own."""
        if self.open:
            print(file=sys.stderr, flush=True)
        self.open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
