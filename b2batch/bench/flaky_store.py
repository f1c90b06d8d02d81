"""A local store that fails on command: full, failing, silent or slow, as a file tells every process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from b2batch.errors import StorageError, StorageFull
from b2batch.outputs.store import LocalStore

_SLOW_S = 0.5
_WRITES = ("put", "put_if_absent")
_READS = ("read", "open")


class StoreFault(StrEnum):
    """What a store can suffer."""

    FULL = "disk full"
    FAILING = "store error"
    REPLY_LOST = "reply lost"
    SLOW = "slow store"


class StoreSwitch:
    """Turns a fault on and off for every process that was given the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def turn_on(self, fault: StoreFault) -> None:
        """From now on, until ``turn_off``."""
        self._path.write_text(fault.value)

    def turn_off(self) -> None:
        """The store is well again."""
        self._path.unlink(missing_ok=True)

    def fault(self) -> StoreFault | None:
        """What the store suffers now."""
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            return None
        return StoreFault(text) if text else None

    def plant(self) -> None:
        """Have all local stores of this process obey; for a process that was made for it."""
        for name in _WRITES:
            setattr(LocalStore, name, self._disturbed(getattr(LocalStore, name), is_write=True))
        for name in _READS:
            setattr(LocalStore, name, self._disturbed(getattr(LocalStore, name), is_write=False))

    def _disturbed(self, method: Callable[..., Any], *, is_write: bool) -> Callable[..., Any]:
        @functools.wraps(method)
        def act(*arguments: Any) -> Any:
            fault = self.fault()
            if fault is StoreFault.SLOW:
                time.sleep(_SLOW_S)
            if fault is StoreFault.FAILING:
                raise StorageError("the store does not answer (planted)")
            if fault is StoreFault.FULL and is_write:
                raise StorageFull("no space left on device (planted)")
            result = method(*arguments)
            if fault is StoreFault.REPLY_LOST and is_write:
                raise StorageError("the reply of the store was lost (planted)")
            return result

        return act
