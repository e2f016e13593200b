"""Members of the weight flow as processes of weights_peer.py, and what they have reported."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from engine.weights import Publisher

SCRIPT = Path(__file__).parent / "weights_peer.py"
START_S = 60.0
"""Importing torch in four processes on a busy machine."""


class Peer:
    """A process of weights_peer.py and what it has reported."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=SCRIPT.parent.parent,
        )  # fmt: skip
        self.reports: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def expect(self, what: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 20.0) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                self.reports.append(json.loads(self._lines.get(timeout=0.1)))
            except queue.Empty:
                continue
            if condition(self.reports[-1]):
                return self.reports[-1]
        raise AssertionError(f"{what}: not within {timeout_s} s; reported {self.reports[-5:]}")

    def version(self, version: int, timeout_s: float = 20.0) -> dict[str, Any]:
        return self.expect(f"version {version}", lambda report: report.get("version") == version, timeout_s)

    def leave(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)


@contextmanager
def peers(publisher: Publisher, *names: str, faults: dict[str, str] | None = None) -> Iterator[list[Peer]]:
    """A subscriber process for each name, joined."""
    with ExitStack() as stack:
        found = []
        for name in names:
            fault = (faults or {}).get(name)
            found.append(Peer("subscribe", str(publisher.address[1]), name, *([fault] if fault else [])))
            stack.callback(found[-1].end)
        for peer in found:
            peer.expect("join", lambda report: "joined" in report, START_S)
        yield found


def eventually(what: str, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def all_verified(found: list[Peer]) -> bool:
    return all(report["equal"] and report["hash"] for peer in found for report in peer.reports if "version" in report)
