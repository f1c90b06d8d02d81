"""One driver at a time: an epoch is one start of a driver, and the newest epoch holds the lease.

An epoch is taken by creating its file exclusively. Its holder rewrites the heartbeat; whoever finds the
heartbeat older than the TTL, released, or left by a process that is gone from this very host, may take
the next epoch. Ages come from the store's clock, never from two hosts' clocks; where that clock may have
jumped, the heartbeat is watched instead. The lease saves work, it does not guard rows: two drivers past an
expired lease are kept apart by the exclusive creation of parts. Breaking a lease is taking the next epoch
and giving it back at once: the driver whose lease it was is fenced at its next beat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from b2batch.errors import Fenced, IntegrityError, RunLocked, StorageError
from b2batch.failpoints import failpoint
from b2batch.outputs.document import encode_document, read_document
from b2batch.outputs.layout import RunKeys
from b2batch.outputs.store import Store

LEASE_TTL_S = 60.0
BEAT_INTERVAL_S = 10.0
_WATCH_S = 1.5 * BEAT_INTERVAL_S
_WATCH_POLL_S = 0.5
_BEAT_RETRY_S = 2.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that took an epoch. ``host_id`` tells its boot and pid namespace; empty: unknown.

    ``token`` is of this one taking: it tells a lost race from a won one whose reply was lost.
    """

    host: str
    host_id: str
    pid: int
    pid_start: str
    job_id: str
    started: str
    token: str = ""

    @classmethod
    def this_process(cls, job_id: str = "") -> Self:
        """This process; ``job_id`` is what its scheduler calls the job."""
        return cls(
            host=socket.gethostname(),
            host_id=_host_id(),
            pid=os.getpid(),
            pid_start=_pid_start(os.getpid()) or "",
            job_id=job_id,
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            token=uuid.uuid4().hex,
        )

    @property
    def is_gone(self) -> bool:
        """Whether this host can tell for certain that the process has ended."""
        if not self.host_id or self.host_id != _host_id():
            return False
        return _pid_start(self.pid) != self.pid_start

    @property
    def can_beat(self) -> bool:
        """Whether this host can tell for certain that the process is there, another one, and not stopped."""
        if not self.host_id or self.host_id != _host_id() or self.pid == os.getpid():
            return False
        return _pid_start(self.pid, but="ZXTt") == self.pid_start

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"pid {self.pid} on {self.host}{job}, started {self.started}"


class Epoch:
    """The lease of a run, held by this driver until ``close``.

    ``beat`` and ``check_not_fenced`` are cheap enough for every turn of a driver's loop; both raise
    Fenced once a newer epoch exists. Leaving the context frees the lease at once.
    """

    def __init__(
        self, store: Store, run8: str, number: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.number = number
        self._store = store
        self._run8 = run8
        self._keys = RunKeys(run8)
        self._clock = clock
        self._next_beat_s = clock()
        self._num_beats = 0

    def beat(self) -> None:
        """Renew the lease; writes at most once in BEAT_INTERVAL_S.

        A store that fails is warned about and tried again soon: whether the run can go on without it is
        not the lease's to decide, and a lease that runs out meanwhile costs work, never a row.
        """
        if self._clock() < self._next_beat_s:
            return
        try:
            self.check_not_fenced()
            self._write_heartbeat(released=False)
        except StorageError as error:
            _log.warning("epoch %d could not renew its lease: %s", self.number, error)
            self._next_beat_s = self._clock() + _BEAT_RETRY_S
        else:
            self._next_beat_s = self._clock() + BEAT_INTERVAL_S

    def check_not_fenced(self) -> None:
        """Raise Fenced when another driver took the run over, or replaced it."""
        newest = _newest_epoch(self._store, self._run8)
        if newest != self.number:
            successor = f"epoch {newest} took it over" if newest > self.number else "its files are gone"
            raise Fenced(f"epoch {self.number} of run {self._run8} is no longer this driver's: {successor}")

    def close(self) -> None:
        """Give the lease back; the next driver need not wait. May be called again."""
        with contextlib.suppress(Fenced, StorageError):  # another driver's already, or it will run out
            self.check_not_fenced()
            self._write_heartbeat(released=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_heartbeat(self, released: bool) -> None:
        self._num_beats += 1
        document = {"epoch": self.number, "released": released, "beat": self._num_beats}
        self._store.put(self._keys.heartbeat, encode_document(document))


@dataclass(frozen=True, slots=True)
class Lease:
    """The newest epoch of a run as another process sees it. ``silent_s``: since its last sign of life."""

    epoch: int
    owner: Owner
    silent_s: float
    is_held: bool

    @property
    def is_beating(self) -> bool:
        """Whether its holder was heard of within one and a half intervals, or seen to beat on."""
        return self.is_held and not _WATCH_S < self.silent_s <= LEASE_TTL_S

    @property
    def ends_in_s(self) -> float:
        """When it ends if nothing more is heard of its holder; 0 where it is free."""
        return max(0.0, LEASE_TTL_S - max(0.0, self.silent_s)) if self.is_held else 0.0


def take_epoch(store: Store, run8: str, job_id: str = "", takeover: bool = False) -> Epoch:
    """Become the driver of a run; removes what dead writers left in its staging directory.

    Raises:
        RunLocked: another driver is alive, or was heard of less than LEASE_TTL_S ago, and
            ``takeover`` is not set; or another driver won the race for the next epoch.
    """
    newest = _newest_epoch(store, run8)
    if newest and not takeover:
        _refuse_live_lease(store, run8)
    epoch = _create_epoch(store, run8, newest + 1, job_id)
    _collect_orphans(store, RunKeys(run8))
    return epoch


def find_lease(store: Store, run8: str) -> Lease | None:
    """The newest lease of a run, held or free; None before the first.

    Takes 15 s where a clock jumped or its holder hangs: then the heartbeat is watched.
    """
    number = _newest_epoch(store, run8)
    if not number:
        return None
    keys = RunKeys(run8)
    owner, heartbeat = _read_owner(store, run8, number), _read_heartbeat(store, keys)
    is_own = heartbeat.get("epoch") == number
    written = [keys.epoch(number), keys.heartbeat] if is_own else [keys.epoch(number)]
    silent_s = min(store.age_s(key) for key in written)
    is_free = (is_own and heartbeat.get("released")) or owner.is_gone
    return Lease(number, owner, silent_s, not is_free and not _is_over(store, keys, owner, silent_s))


def break_lease(store: Store, run8: str, lease: Lease) -> int:
    """End ``lease`` and no other: the epoch after it, which holds nothing, is returned.

    Raises:
        RunLocked: it was taken over meanwhile.
    """
    with _create_epoch(store, run8, lease.epoch + 1, "lock break") as epoch:
        return epoch.number


def _create_epoch(store: Store, run8: str, number: int, job_id: str) -> Epoch:
    owner = Owner.this_process(job_id)
    if not store.put_if_absent(RunKeys(run8).epoch(number), encode_document(asdict(owner))):
        winner = _read_owner(store, run8, number)
        if winner != owner:
            raise RunLocked(f"{store.uri}: another driver was a moment faster: {winner}")
    failpoint("F3")
    epoch = Epoch(store, run8, number)
    epoch.beat()
    return epoch


def newest_owner(store: Store, run8: str) -> Owner | None:
    """The process that took the newest epoch of a run; None before the first."""
    newest = _newest_epoch(store, run8)
    return _read_owner(store, run8, newest) if newest else None


def _newest_epoch(store: Store, run8: str) -> int:
    stems = (Path(key).stem for key, _ in store.list(RunKeys(run8).epochs))
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def _refuse_live_lease(store: Store, run8: str) -> None:
    lease = find_lease(store, run8)
    if lease is None or not lease.is_held:
        return
    raise RunLocked(
        f"{store.uri}: run {run8} is being worked on by epoch {lease.epoch}: {lease.owner}; last heartbeat "
        f"{max(0.0, lease.silent_s):.0f} s ago, the lease ends {LEASE_TTL_S:.0f} s after the last one. "
        "--wait-lock waits for it; if that driver is surely dead, --takeover does not."
    )


def _is_over(store: Store, keys: RunKeys, owner: Owner, age_s: float) -> bool:
    """Whether the lease ran out, also where the clock that tells its age was set meanwhile."""
    if abs(age_s) <= LEASE_TTL_S:
        return False
    if age_s > 0 and not owner.can_beat:
        return True
    # Its process is at work, or its last beat lies in the future: the clock jumped, or the driver hangs.
    return not _beats_on(store, keys)


def _beats_on(store: Store, keys: RunKeys) -> bool:
    """Whether the heartbeat changes within one and a half intervals of this process's own clock."""
    first, deadline_s = _read_heartbeat(store, keys), time.monotonic() + _WATCH_S
    while time.monotonic() < deadline_s:
        time.sleep(_WATCH_POLL_S)
        if _read_heartbeat(store, keys) != first:
            return True
    return False


def _read_owner(store: Store, run8: str, number: int) -> Owner:
    try:
        return Owner(**read_document(store, RunKeys(run8).epoch(number)))
    except TypeError as error:
        raise IntegrityError(f"epoch {number} of run {run8} is damaged: {error}") from error


def _read_heartbeat(store: Store, keys: RunKeys) -> Mapping[str, Any]:
    try:
        return read_document(store, keys.heartbeat)
    except FileNotFoundError:  # the driver died between its epoch and its first beat
        return {}


def _collect_orphans(store: Store, keys: RunKeys) -> None:
    """Remove staged files that nobody can still be writing: older than the TTL."""
    for key, _ in list(store.list(f"{keys.staging}/")):
        try:
            orphaned = store.age_s(key) > LEASE_TTL_S
        except FileNotFoundError:  # its writer finished meanwhile
            continue
        if orphaned:
            store.delete(key)


def _host_id() -> str:
    """This boot of this host, and the pid namespace: where two pids can be compared. Linux only."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _pid_start(pid: int, but: str = "ZX") -> str | None:
    """When a process started, in clock ticks since boot; None when it has ended, reaped or not.

    ``but`` are the states of ``proc(5)`` in which it does not count as there.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in but else fields[18]
