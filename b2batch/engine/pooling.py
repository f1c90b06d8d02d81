"""Hidden states of a prompt, chunk by chunk → one vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


class Pool:
    """Takes hidden states in order of their positions; what a preemption computes again counts once."""

    def __init__(self) -> None:
        self._num_taken = 0
        self._sum: Tensor | None = None
        self._last: Tensor | None = None

    def take(self, hidden_TC: Tensor, start: int) -> None:
        """Add the states of the positions from ``start`` on, of which the first may be known already."""
        new = hidden_TC[max(0, self._num_taken - start) :]
        if len(new):
            total = new.sum(dim=0, dtype=torch.float32)
            self._sum = total if self._sum is None else self._sum + total
            self._last = new[-1]
            self._num_taken += len(new)

    def vector(self, pooling: Literal["mean", "last"]) -> tuple[float, ...]:
        """The mean of all states, or the last one."""
        assert self._sum is not None
        assert self._last is not None
        chosen = self._sum / self._num_taken if pooling == "mean" else self._last.float()
        return tuple(chosen.tolist())
