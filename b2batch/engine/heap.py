"""The C heap of a process that computes on a CPU: memory that a step frees is kept for the next one."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE_BYTES = 1 << 20
_MMAP_BYTES = 32 << 20  # the most that glibc takes
_TRIM_BYTES = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Have malloc reuse what was freed instead of giving it back to the system at once.

    A step's activations are some megabytes each, which glibc maps anew every time: 9 % of a
    labelling job's CPU time went into page faults. Does nothing on another C library.
    """
    _tell_malloc("mallopt", _M_MMAP_THRESHOLD, _MMAP_BYTES)
    _tell_malloc("mallopt", _M_TRIM_THRESHOLD, _TRIM_BYTES)


def return_freed_memory() -> None:
    """Have malloc give large blocks back at once: for loading, which has each tensor in full for a moment.

    What stays is allocated between them, and would keep their room from the system: with int8, 1.7 times the
    weights in full precision were taken at the peak, and 0.6 times now. ``keep_freed_memory`` ends it.
    """
    _tell_malloc("mallopt", _M_MMAP_THRESHOLD, _LARGE_BYTES)


def release_freed_memory() -> None:
    """Give the system what was kept: after a step that ran out of memory it is of use elsewhere.

    oneDNN, for one, maps the code that it makes for a new shape of step beside the heap.
    """
    _tell_malloc("malloc_trim", 0)


def _tell_malloc(name: str, *values: int) -> None:
    if sys.platform.startswith("linux") and (function := getattr(ctypes.CDLL(None), name, None)):
        function(*values)
