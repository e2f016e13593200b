"""How a message's fields are checked when it is made or decoded: one error that says what, got and expected."""

from __future__ import annotations

import numpy as np


def check(ok: bool, what: str, got: object, expected: str) -> None:
    """Raises `ValueError` unless `ok`."""
    if not ok:
        raise ValueError(f"{what}: got {got!r}, expected {expected}")


def check_array(what: str, array: np.ndarray, dtype: np.dtype, length: int | None = None) -> None:
    """Raises `ValueError` unless it is an array [length] of this type, of any length where that is None."""
    check(isinstance(array, np.ndarray), what, type(array).__name__, "a numpy array")
    if array.dtype != dtype or array.ndim != 1:  # tested first: to print a dtype costs more than the rest of a decode
        check(False, what, f"{array.dtype}{list(array.shape)}", f"{dtype} of one axis")
    if length is not None:
        check(array.shape[0] == length, what, array.shape[0], f"{length} entries")
