"""One replica: a worker on a thread of its own, and a mailbox that the driver polls.

Nothing here knows Ray; ``fleet`` makes an actor of it. The driver's calls never wait for the engine:
``poll`` hands in leases and takes out reports under one lock, so a replica answers while its model
loads or a long step runs. News stays here until the driver says that it has it, and a lease given
twice is taken once: a reply lost on the way loses nothing. A unit that took a replica down runs in
pieces; none begins before the driver has said that it knows which one comes next.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from b2batch.rows import Caution, PieceBegun, UnitReport, WorkUnit
from b2batch.telemetry import Progress

_FEW_LEASES = 1  # not begun; with fewer the driver is to send more
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

    @property
    def next_piece(self) -> PieceBegun | None:
        """The piece of a unit under caution whose turn it is."""
        ...

    def add_unit(
        self, unit: WorkUnit, attempt: int, caution: Caution | None = None, *, trusts_nan: bool = False
    ) -> None:
        """Take a unit. An exception fails this attempt of the unit, not the replica."""
        ...

    def begin_piece(self) -> None:
        """Go on with ``next_piece``. An exception fails this attempt of its unit."""
        ...

    def drop_unit(self, unit_index: int) -> None:
        """Leave a unit; nothing if it is not there."""
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
    caution: Caution | None = None
    trusts_nan: bool = False


@dataclass(frozen=True, slots=True)
class CancelUnit:
    """Leave this attempt: another replica has committed the unit."""

    unit_index: int
    attempt: int


Order = UnitLease | CancelUnit
News = UnitReport | PieceBegun


class ReplicaState(Enum):
    """STARTING: it has a process, and waits until it may load its model.

    FAILED is final: ``ReplicaUpdate.error`` says why, ``was_ready`` whether it ever could work.
    """

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ReplicaUpdate:
    """The answer to a poll. ``num_news`` counts all news so far, up to the last in ``news``."""

    state: ReplicaState
    was_ready: bool
    news: tuple[News, ...]
    num_news: int
    num_steps: int
    progress: Progress
    error: tuple[str, str, str] | None = None
    node_id: str = ""


class Replica:
    """Builds the worker on its own thread as soon as it has its turn; ``poll`` tells when it is ready."""

    def __init__(
        self, make_worker: MakeWorker, node_id: str = "", turn: AbstractContextManager[object] | None = None
    ) -> None:
        """``turn`` is entered while the worker is built: it may wait for others of this node."""
        self._make_worker = make_worker
        self._node_id = node_id
        self._turn = turn or nullcontext()
        self._changed = threading.Condition()
        self._state = ReplicaState.STARTING
        self._was_ready = False
        self._error: tuple[str, str, str] | None = None
        self._inbox: deque[UnitLease] = deque()
        self._cancelled: deque[int] = deque()  # units that the worker has to drop
        self._seen: dict[int, int] = {}  # unit index -> the latest attempt that was leased to us
        self._news: deque[News] = deque()  # what the driver has not acknowledged
        self._num_news = 0
        self._num_steps = 0
        self._progress = Progress()
        self._is_stopping = False
        self._is_woken = True  # the first poll is answered at once: there is a process
        self._thread = threading.Thread(target=self._run, name="b2batch-worker", daemon=True)
        self._thread.start()

    # --- called by the driver, on any thread -----------------------------------------------------

    def poll(self, num_known: int, orders: tuple[Order, ...], timeout_s: float) -> ReplicaUpdate:
        """Hand in ``orders``, wait up to ``timeout_s`` for news, and tell it.

        ``num_known`` is how much news the caller has: it is dropped here, the rest told again.
        """
        with self._changed:
            self._acknowledge(num_known)
            self._accept(orders)
            self._changed.wait_for(lambda: self._is_woken or self._has_urgent_news(), timeout_s)
            self._is_woken = False
            return self._update()

    def wake(self) -> None:
        """Let a waiting poll return: the driver has something to hand in."""
        with self._changed:
            self._wake()

    def stop(self, timeout_s: float) -> bool:
        """End after the engine's current step, so that no commit is cut; True when it has ended."""
        with self._changed:
            self._is_stopping = True
            self._wake()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _acknowledge(self, num_known: int) -> None:
        num_unknown = self._num_news - num_known
        while len(self._news) > max(0, num_unknown):
            item = self._news.popleft()
            if isinstance(item, UnitReport) and self._seen.get(item.unit_index) == item.attempt:
                del self._seen[item.unit_index]
        self._changed.notify_all()

    def _accept(self, orders: tuple[Order, ...]) -> None:
        for order in orders:
            if isinstance(order, CancelUnit):
                self._cancel(order)
            elif order.attempt > self._seen.get(order.unit.index, 0):
                self._seen[order.unit.index] = order.attempt
                self._inbox.append(order)
        if orders:
            self._changed.notify_all()

    def _has_urgent_news(self) -> bool:
        """Receipts can wait while there are units enough that are not begun; nothing else can."""
        if len(self._inbox) <= _FEW_LEASES:
            return bool(self._news)
        return any(isinstance(item, PieceBegun) or item.error for item in self._news)

    def _cancel(self, order: CancelUnit) -> None:
        if self._seen.get(order.unit_index) != order.attempt:
            return  # told twice, or over already
        waiting = [lease for lease in self._inbox if lease.unit.index == order.unit_index]
        for lease in waiting:
            self._inbox.remove(lease)
        if not waiting:
            self._cancelled.append(order.unit_index)

    def _update(self) -> ReplicaUpdate:
        return ReplicaUpdate(
            self._state,
            self._was_ready,
            tuple(self._news),
            self._num_news,
            self._num_steps,
            self._progress,
            self._error,
            self._node_id,
        )

    def _wake(self) -> None:
        self._is_woken = True
        self._changed.notify_all()

    # --- the worker's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._turn:
                self._enter(ReplicaState.LOADING)
                worker = self._make_worker()
            self._enter(ReplicaState.READY)
            while not self._is_stopping:
                self._feed(worker)
                if worker.idle:
                    self._wait_for_orders()
                elif self._begin_piece(worker):
                    self._step(worker)
        except BaseException as error:  # a SystemExit here must not look like a replica that is well
            self._enter(ReplicaState.FAILED, error_text(error))

    def _enter(self, state: ReplicaState, error: tuple[str, str, str] | None = None) -> None:
        with self._changed:
            self._state = state
            self._was_ready = self._was_ready or state is ReplicaState.READY
            self._error = error
            self._wake()

    def _feed(self, worker: Worker) -> None:
        while self._cancelled:
            worker.drop_unit(self._cancelled.popleft())
        while worker.wants_unit and (lease := self._next_lease()):
            try:
                worker.add_unit(lease.unit, lease.attempt, lease.caution, trusts_nan=lease.trusts_nan)
            except Exception as error:
                self._publish([UnitReport(lease.unit.index, lease.attempt, error=error_text(error))])

    def _next_lease(self) -> UnitLease | None:
        with self._changed:
            if not self._inbox:
                return None
            self._changed.notify_all()
            return self._inbox.popleft()

    def _begin_piece(self, worker: Worker) -> bool:
        """Begin the piece whose turn it is, if there is one; whether the worker can go on."""
        piece = worker.next_piece
        if piece is None:
            return True
        if not self._announce(piece):
            return False
        try:
            worker.begin_piece()
        except Exception as error:
            worker.drop_unit(piece.unit_index)
            self._publish([UnitReport(piece.unit_index, piece.attempt, error=error_text(error))])
            return False
        return True

    def _announce(self, piece: PieceBegun) -> bool:
        """Tell the driver, and wait until it is known there; False when something else comes first."""
        self._publish([piece])
        with self._changed:
            self._changed.wait_for(lambda: piece not in self._news or self._is_stopping)
        return not self._is_stopping and not self._cancelled

    def _wait_for_orders(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or bool(self._inbox) or bool(self._cancelled))

    def _step(self, worker: Worker) -> None:
        reports = worker.step()
        self._num_steps += 1
        self._progress = worker.progress()
        if reports:
            self._publish(reports)

    def _publish(self, news: Sequence[News]) -> None:
        with self._changed:
            self._news.extend(news)
            self._num_news += len(news)
            self._changed.notify_all()


def error_text(error: BaseException) -> tuple[str, str, str]:
    """Code, message and traceback as bounded strings: the object itself may not survive pickling."""
    trace = "".join(traceback.format_exception(error))
    return type(error).__name__, str(error)[:_MAX_MESSAGE_CHARS], trace[-_MAX_TRACEBACK_CHARS:]
