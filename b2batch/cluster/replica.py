"""One replica: a worker on a thread of its own, and a mailbox that the driver polls.

Nothing here knows Ray; ``fleet`` makes an actor of it. The driver's calls never wait for the engine:
``poll`` hands in leases and takes out reports under one lock, so a replica answers while its model
loads or a long step runs. Reports stay here until the driver says that it has them, and a lease given
twice is taken once: a reply lost on the way loses nothing.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from b2batch.rows import UnitReport, WorkUnit
from b2batch.telemetry import Progress

_MAX_MESSAGE_CHARS = 2_000
_MAX_TRACEBACK_CHARS = 8_000


class Worker(Protocol):
    """What a replica drives; ``b2batch.worker.Worker`` in a run. Used from one thread only."""

    @property
    def wants_unit(self) -> bool:
        """Whether rows of another unit would find room soon."""
        ...

    @property
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        ...

    def add_unit(self, unit: WorkUnit, attempt: int) -> None:
        """Take a unit. An exception fails this attempt of the unit, not the replica."""
        ...

    def step(self) -> list[UnitReport]:
        """One step of the engine; reports of units that ended in it. An exception ends the replica."""
        ...

    def progress(self) -> Progress:
        """Counters since the worker was built."""
        ...


MakeWorker = Callable[[], Worker]


@dataclass(frozen=True, slots=True)
class UnitLease:
    """A unit to compute, and which attempt at it this is."""

    unit: WorkUnit
    attempt: int


class ReplicaState(Enum):
    """FAILED is final: ``ReplicaUpdate.error`` says why, and whether it was ever ready."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ReplicaUpdate:
    """The answer to a poll. ``num_reports`` counts all reports so far, up to the last one in ``reports``."""

    state: ReplicaState
    was_ready: bool
    reports: tuple[UnitReport, ...]
    num_reports: int
    num_steps: int
    progress: Progress
    error: tuple[str, str, str] | None = None


class Replica:
    """Builds the worker on its own thread at once; ``poll`` tells when it is ready."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._make_worker = make_worker
        self._changed = threading.Condition()
        self._state = ReplicaState.STARTING
        self._was_ready = False
        self._error: tuple[str, str, str] | None = None
        self._inbox: deque[UnitLease] = deque()
        self._seen: dict[int, int] = {}  # unit index -> the latest attempt that was leased to us
        self._reports: deque[UnitReport] = deque()  # those the driver has not acknowledged
        self._num_reports = 0
        self._num_steps = 0
        self._progress = Progress()
        self._is_stopping = False
        self._has_news = False
        self._thread = threading.Thread(target=self._run, name="b2batch-worker", daemon=True)
        self._thread.start()

    # --- called by the driver, on any thread -----------------------------------------------------

    def poll(self, num_known: int, leases: tuple[UnitLease, ...], timeout_s: float) -> ReplicaUpdate:
        """Hand in ``leases``, wait up to ``timeout_s`` for news, and tell them.

        ``num_known`` is how many reports the caller has: those are dropped here, the others told again.
        """
        with self._changed:
            self._acknowledge(num_known)
            self._accept(leases)
            self._changed.wait_for(lambda: self._has_news or bool(self._reports), timeout_s)
            self._has_news = False
            return self._update()

    def wake(self) -> None:
        """Let a waiting poll return: the driver has something to hand in."""
        with self._changed:
            self._tell_news()

    def stop(self, timeout_s: float) -> bool:
        """End after the engine's current step, so that no commit is cut; True when it has ended."""
        with self._changed:
            self._is_stopping = True
            self._tell_news()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _acknowledge(self, num_known: int) -> None:
        num_unknown = self._num_reports - num_known
        while len(self._reports) > max(0, num_unknown):
            report = self._reports.popleft()
            if self._seen.get(report.unit_index) == report.attempt:
                del self._seen[report.unit_index]

    def _accept(self, leases: tuple[UnitLease, ...]) -> None:
        for lease in leases:
            if lease.attempt > self._seen.get(lease.unit.index, 0):
                self._seen[lease.unit.index] = lease.attempt
                self._inbox.append(lease)
        if leases:
            self._changed.notify_all()

    def _update(self) -> ReplicaUpdate:
        return ReplicaUpdate(
            self._state,
            self._was_ready,
            tuple(self._reports),
            self._num_reports,
            self._num_steps,
            self._progress,
            self._error,
        )

    def _tell_news(self) -> None:
        self._has_news = True
        self._changed.notify_all()

    # --- the worker's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            worker = self._make_worker()
            self._enter(ReplicaState.READY)
            while not self._is_stopping:
                self._feed(worker)
                if worker.idle:
                    self._wait_for_lease()
                else:
                    self._step(worker)
        except BaseException as error:  # a SystemExit here must not look like a replica that is well
            self._enter(ReplicaState.FAILED, error_text(error))

    def _enter(self, state: ReplicaState, error: tuple[str, str, str] | None = None) -> None:
        with self._changed:
            self._state = state
            self._was_ready = self._was_ready or state is ReplicaState.READY
            self._error = error
            self._tell_news()

    def _feed(self, worker: Worker) -> None:
        while self._inbox and worker.wants_unit:
            lease = self._inbox.popleft()
            try:
                worker.add_unit(lease.unit, lease.attempt)
            except Exception as error:
                self._publish([UnitReport(lease.unit.index, lease.attempt, error=error_text(error))])

    def _wait_for_lease(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or bool(self._inbox))

    def _step(self, worker: Worker) -> None:
        reports = worker.step()
        self._num_steps += 1
        self._progress = worker.progress()
        if reports:
            self._publish(reports)

    def _publish(self, reports: list[UnitReport]) -> None:
        with self._changed:
            self._reports.extend(reports)
            self._num_reports += len(reports)
            self._changed.notify_all()


def error_text(error: BaseException) -> tuple[str, str, str]:
    """Code, message and traceback as bounded strings: the object itself may not survive pickling."""
    trace = "".join(traceback.format_exception(error))
    return type(error).__name__, str(error)[:_MAX_MESSAGE_CHARS], trace[-_MAX_TRACEBACK_CHARS:]
