"""Sequences in pieces (``itertools.batched`` is not there before Python 3.12)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def batched(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Runs of ``size`` neighbours; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))
