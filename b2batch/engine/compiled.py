"""Loops over arrays as machine code, by numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as machine code, kept on the disk for the next process where there is a place for it.

    Sums may be taken in any order, so that they run in vectors; what is no number must stay none.
    """
    options: dict[str, Any] = {
        "fastmath": {"reassoc", "contract", "arcp", "nsz"},
        "nogil": True,
        "error_model": "numpy",
    }
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package nor the home can be written to
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
