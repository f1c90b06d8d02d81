"""SIGINT, SIGTERM, and Slurm's SIGUSR1: the first asks the run to drain, the second ends it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_FORCED = 128


class StopSignals:
    """Handles the signals while its context is open; for the main thread.

    The first signal makes ``is_asked`` true and is told through ``say``. The second raises SystemExit
    in the main thread, which releases the lease on its way and leaves the context with 128 + signal;
    the third does not wait for anything.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._num_received = 0
        self._forced_code: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def is_asked(self) -> bool:
        """Whether a signal came."""
        return self._num_received > 0

    def forced_code(self) -> int | None:
        """The exit code of a forced end, or None."""
        return self._forced_code

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._forced_code is not None:
            raise SystemExit(self._forced_code) from error  # Ray may have made code 1 of it

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._num_received += 1
        if self._num_received == 1:
            self._say(
                f"{signal.Signals(number).name}: stopping; leased units are finished first, for up to "
                "cluster.drain_grace_s, and the same command goes on later. Once more ends at once."
            )
        elif self._num_received == 2:
            self._forced_code = _code_of(number)
            raise SystemExit(self._forced_code)
        else:
            os._exit(_code_of(number))


def _code_of(number: int) -> int:
    """As a shell reports the signal; SIGUSR1 stands for the SIGTERM that Slurm sends after it."""
    return _FORCED + (signal.SIGTERM if number == signal.SIGUSR1 else number)
