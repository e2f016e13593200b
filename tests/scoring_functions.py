"""Scoring functions of every bad kind, for the tests of the scorer pool. The scorers import this module."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

_KEPT: list[bytearray] = []


def equal(text: str, answer_row: dict[str, Any]) -> bool:
    return text == answer_row["answer"]


def pid(text: str, answer_row: dict[str, Any]) -> float:
    return float(os.getpid())


def slow(text: str, answer_row: dict[str, Any]) -> bool:
    time.sleep(float(text))
    return True


def own_reward(text: str, answer_row: dict[str, Any]) -> dict[str, Any]:
    return {"correct": False, "reward": 0.25, "style": len(text)}


def prints(text: str, answer_row: dict[str, Any]) -> bool:
    print("\x00\x00\x00\x05hello" * 1000)
    os.write(1, b"\xff" * 100)
    subprocess.run(["echo", "from a child"], check=True)
    return sys.stdin.read() == "" and text == answer_row["answer"]


def hangs_in_c(text: str, answer_row: dict[str, Any]) -> bool:
    return re.match(r"(a+)+$", "a" * 64 + "b") is not None


def ignores_signals(text: str, answer_row: dict[str, Any]) -> bool:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def segfaults(text: str, answer_row: dict[str, Any]) -> bool:
    ctypes.string_at(0)
    return True


def exits(text: str, answer_row: dict[str, Any]) -> bool:
    sys.exit("enough")


def exits_at_once(text: str, answer_row: dict[str, Any]) -> bool:
    os._exit(0)


def raises(text: str, answer_row: dict[str, Any]) -> bool:
    raise RuntimeError("no \udcff such luck")


def recurses(text: str, answer_row: dict[str, Any]) -> bool:
    return recurses(text, answer_row)


def returns_nonsense(text: str, answer_row: dict[str, Any]) -> str:
    return "right"


def eats_memory(text: str, answer_row: dict[str, Any]) -> bool:
    while True:
        _KEPT.append(bytearray(16 << 20))


def fork_bomb(text: str, answer_row: dict[str, Any]) -> bool:
    """40 children, every second one in a session of its own; then hangs."""
    for number in range(40):
        if os.fork() == 0:
            if number % 2:
                os.setsid()
                if os.fork():
                    os._exit(0)
            break
    while True:
        time.sleep(1)


def child_holds_pipe(text: str, answer_row: dict[str, Any]) -> bool:
    """Ends while a child keeps the pipe to the pool open: the pool sees no end of file."""
    if os.fork() == 0:
        time.sleep(300)
        os._exit(0)
    os._exit(3)


def child_returns(text: str, answer_row: dict[str, Any]) -> bool:
    """Both the process and its child return from here."""
    os.fork()
    return text == answer_row["answer"]


def leaves_a_child(text: str, answer_row: dict[str, Any]) -> bool:
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    return True


def writes_to_every_pipe(text: str, answer_row: dict[str, Any]) -> bool:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"\xff\xff\xff\xff" + b"x" * 100)
        except OSError:
            continue
    return True


def answers_late(text: str, answer_row: dict[str, Any]) -> bool:
    """A thread of it writes into the pool's pipe after the answer."""

    def write() -> None:
        time.sleep(0.3)
        writes_to_every_pipe(text, answer_row)

    threading.Thread(target=write).start()
    return True
