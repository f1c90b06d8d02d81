"""The lock of an output for people and schedulers: who holds it, waiting for it, breaking it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from b2batch.errors import Drained, RunLocked
from b2batch.outputs.layout import RunKeys
from b2batch.outputs.lease import Lease, break_lease, find_lease
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store

_OWN_ID = "lock"  # staging of its own: to make the run's again would let its stray writers in
_POLL_S = 2.0
_LISTEN_S = 0.2
_TELL_AGAIN_S = 60.0
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lock:
    """The lock of the run that an output holds; ``lease`` is None before its first driver."""

    output: str
    run_id: str
    lease: Lease | None

    @property
    def is_held(self) -> bool:
        """Whether a driver works there, or may."""
        return self.lease is not None and self.lease.is_held


def find_lock(path: str) -> Lock:
    """Who holds the lock of an output directory, which is only read: of a local one by this machine's clock.

    Raises:
        OutputError: the directory holds no run.
    """
    return _lock_of(RunDirectory.existing(open_store(path)))


def find_lock_to_break(path: str) -> Lock:
    """Who holds the lock of an output directory by its own clock, as the drivers see it.

    Raises:
        OutputError: the directory holds no run, or cannot be written, which its clock is read by.
    """
    with _opened(path) as directory:
        return _lock_of(directory)


def break_lock(path: str, seen: Lease, *, force: bool = False) -> int:
    """Free the lock that ``seen`` holds; the number of the epoch that fences its holder.

    Raises:
        RunLocked: its holder is alive and ``force`` is not set, or another took it meanwhile.
    """
    with _opened(path) as directory:
        lock = _lock_of(directory)
        if lock.lease is None or lock.lease.epoch != seen.epoch:
            raise RunLocked(f"{lock.output}: the lock changed hands meanwhile: look again")
        if lock.lease.is_beating and not force:
            raise RunLocked(
                f"{lock.output}: the holder is alive: {lock.lease.owner}; last heartbeat "
                f"{max(0.0, lock.lease.silent_s):.0f} s ago. Stop it, or break the lock with --force"
            )
        return break_lease(directory.store, directory.record.run8, lock.lease)


def when_free(
    take: Callable[[], _Result],
    wait_s: float,
    should_stop: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> _Result:
    """What ``take`` returns, called again for up to ``wait_s`` while it says that another driver works.

    Raises:
        RunLocked: as ``take`` did last, when the time is over.
        Drained: ``should_stop`` asked for it meanwhile.
    """
    end_s, told_s = clock() + wait_s, float("-inf")
    while True:
        try:
            return take()
        except RunLocked as locked:
            if clock() >= end_s:
                raise
            if clock() >= told_s + _TELL_AGAIN_S:
                told_s = clock()
                _log.info("waiting for the lock: %s", locked)
        next_s = min(clock() + _POLL_S, end_s)
        while clock() < next_s:
            if should_stop():
                raise Drained("stopped while it waited for the lock; the same command waits again")
            sleep(_LISTEN_S)


def _lock_of(directory: RunDirectory) -> Lock:
    return Lock(
        directory.store.uri, directory.record.run_id, find_lease(directory.store, directory.record.run8)
    )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[RunDirectory]:
    """The run in a directory, with a staging of its own as long as the context is open."""
    directory = RunDirectory.existing(open_store(path, _OWN_ID))
    directory.store.probe()
    try:
        yield directory
    finally:
        directory.store.delete_tree(RunKeys(_OWN_ID).root)
