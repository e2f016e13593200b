"""One measurement of the learner benchmark: seconds, memory and results of a piece of work, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil
from msgspec import Struct
from torch import Tensor

TIMEOUT_S = 900.0


class Measured(Struct, frozen=True):
    """One process's figures: wall and processor seconds, temporary bytes at the peak, loss, gradient norm."""

    seconds: float
    cpu_seconds: float
    peak_bytes: float
    loss: float
    grad_norm: float


def measured(work: Callable[[], Callable[[], tuple[float, float]]]) -> Measured:
    """`work` does what is measured, and gives back how to find the loss and the gradient norm after that."""
    resident = psutil.Process().memory_info().rss
    peak_before = _peak_bytes()
    cpu, began = time.process_time(), time.perf_counter()
    result = work()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    peak = _peak_bytes()
    if peak <= peak_before:
        raise RuntimeError(f"benchmark: a peak of {peak} bytes, expected more than {peak_before}, that of the set-up")
    loss, grad_norm = result()
    return Measured(seconds, cpu_seconds, peak - resident, loss, grad_norm)


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a new process. Raises RuntimeError when it fails or takes longer than `TIMEOUT_S`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=[theirs, function, *arguments], daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIMEOUT_S):
            raise RuntimeError(f"benchmark: {function.__name__}: no result within {TIMEOUT_S:.0f} s")
        return ours.recv()
    except EOFError:
        process.join(TIMEOUT_S)
        raise RuntimeError(f"benchmark: {function.__name__}: its process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _answer(results: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    results.send(function(*arguments))


def norm(gradients: list[Tensor]) -> float:
    """In float64: over 135M numbers float32 is off by a percent."""
    return float(sum(gradient.double().square().sum() for gradient in gradients)) ** 0.5
