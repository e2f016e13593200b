"""Give large freed tensors back to the system at once (CPU training on glibc)."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 1 << 20


def return_freed_tensors() -> bool:
    """Map allocations of over 1 MiB on their own, so that freeing one returns it. False where the C library has no mallopt.

    By default glibc raises this threshold to the size of what was freed (up to 32 MiB), and tensors below it are cut out of
    a heap that cannot shrink while anything behind them lives. Measured with a 135M-parameter model and a row of 1271
    tokens: 2.0 GB of activations at the peak in place of 2.8 GB, at the same speed. Fresh pages cost time: a 1.6M-parameter
    model, whose memory does not matter, was 1.5x slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES))
