"""The loop between the dispatcher's decisions and the replicas: effects only, nothing per row."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from b2batch.cluster.actions import (
    Action,
    Cancel,
    CheckCommitted,
    Fail,
    Finish,
    KillReplica,
    Lease,
    StartReplica,
)
from b2batch.cluster.dispatch import Dispatcher
from b2batch.cluster.fleet import Answer, Fleet, FleetEvent, Lost, NotStarted, Target
from b2batch.cluster.policy import DispatchPolicy, Loss
from b2batch.cluster.replica import CancelUnit, ReplicaState, ReplicaUpdate, UnitLease
from b2batch.cluster.verdict import ErrorText
from b2batch.errors import Drained, ReplicaSuspect
from b2batch.rows import PieceBegun, UnitCounts, WorkUnit
from b2batch.telemetry import Progress

logger = logging.getLogger(__name__)

_TICK_S = 0.5
_BEAT_S = 1.0
_PROGRESS_S = 1.0
_CLOSE_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Where this start of the driver is. Units committed by earlier starts are not counted.

    ``counts`` is the account of committed units; ``live`` also counts rows of units under way.
    ``num_attempts`` are units that were begun, ``num_rows_again`` the rows of those begun before: what
    deaths, failures and copies cost at most.
    """

    num_units: int
    num_committed: int
    counts: UnitCounts
    num_attempts: int
    num_rows_again: int
    live: Progress
    num_ready: int
    num_starting: int
    num_lost: int


@dataclass(frozen=True, slots=True)
class RunTotals:
    """What a completed ``run_units`` did; see ``RunProgress``."""

    num_units: int
    counts: UnitCounts
    num_attempts: int
    num_rows_again: int
    num_replicas_lost: int


@dataclass(frozen=True, slots=True)
class RunHooks:
    """What the driver asks of its caller; all but ``find_committed`` are called on the driver's thread.

    Attributes:
        find_committed: the counts of a unit's part when the store has it, else None. Called on
            another thread. An OSError counts as None: the commit itself is what decides.
        on_progress: called about once a second and once at the end.
        on_beat: about once a second: renews the lease of the output when it is time; Fenced ends the run.
        should_stop: True asks the run to drain.
    """

    find_committed: Callable[[WorkUnit], UnitCounts | None]
    on_progress: Callable[[RunProgress], None]
    on_beat: Callable[[], None]
    should_stop: Callable[[], bool]


def run_units(
    units: Sequence[WorkUnit],
    fleet: Fleet,
    policy: DispatchPolicy,
    hooks: RunHooks,
    *,
    drain_grace_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> RunTotals:
    """Have the replicas of ``fleet`` commit every unit; ends the replicas in any case.

    Args:
        units: those to do, with ascending ``index``.
        drain_grace_s: how long leased units may go on after ``should_stop`` says True.

    Raises:
        Drained: ``should_stop`` said so; what was committed stays.
        Fenced: from ``on_beat``.
        ClusterError: no replica could be had or kept.
        UnitFailed: a unit failed too often. An error that no retry mends keeps its own class.
    """
    driver = _Driver(units, fleet, policy, hooks, drain_grace_s, clock)
    grace_s = 0.0  # an interrupt must not wait
    try:
        totals = driver.run()
        grace_s = _CLOSE_GRACE_S
    except Exception:
        grace_s = _CLOSE_GRACE_S
        raise
    finally:
        driver.close()
        fleet.close(grace_s)
    return totals


class _Driver:
    def __init__(
        self,
        units: Sequence[WorkUnit],
        fleet: Fleet,
        policy: DispatchPolicy,
        hooks: RunHooks,
        drain_grace_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._units = units
        self._fleet = fleet
        self._hooks = hooks
        self._drain_grace_s = drain_grace_s
        self._clock = clock
        self._dispatcher = Dispatcher(
            (unit.index for unit in units),
            policy,
            self._describe_unit,
            lambda unit_index: self._unit(unit_index).num_rows,
        )
        self._checks: dict[Future[UnitCounts | None], int] = {}
        self._checker = ThreadPoolExecutor(max_workers=4, thread_name_prefix="b2batch-check")
        self._progress: dict[int, Progress] = {}
        self._live = Progress()  # of all replicas, the lost ones too; kept, as summing costs
        self._told_start_errors: set[tuple[str, str]] = set()
        self._drain_deadline_s: float | None = None
        self._next_tick_s = self._next_beat_s = self._next_progress_s = clock()
        self._is_finished = False

    def run(self) -> RunTotals:
        self._apply(self._dispatcher.start(self._clock()))
        while not self._is_finished:
            self._drain_if_asked()
            for event in self._fleet.wait(_TICK_S):
                self._handle(event)
            self._collect_checks()
            self._keep_time(self._clock())
        self._hooks.on_progress(self._run_progress())
        units = self._dispatcher.units
        return RunTotals(
            units.num_units, units.counts, units.num_attempts, units.num_rows_again, self._dispatcher.num_lost
        )

    def close(self) -> None:
        self._checker.shutdown(wait=False, cancel_futures=True)

    # --- events ----------------------------------------------------------------------------------

    def _handle(self, event: FleetEvent) -> None:
        match event:
            case Answer(replica_id, update):
                self._handle_answer(replica_id, update)
            case Lost(replica_id, loss, detail):
                self._lose(replica_id, loss, detail)
            case NotStarted(replica_id, error):
                self._give_up_start(replica_id, error)
            case Target(num_replicas):
                logger.info("nodes joined or left: %d replicas from now on", num_replicas)
                self._apply(self._dispatcher.on_target(num_replicas))

    def _handle_answer(self, replica_id: int, update: ReplicaUpdate) -> None:
        now_s = self._clock()
        if replica_id in self._progress:  # else it was killed after it had answered
            self._live += update.progress - self._progress[replica_id]
            self._progress[replica_id] = update.progress
        self._dispatcher.on_heartbeat(replica_id, update.num_steps, now_s)
        if update.state is ReplicaState.LOADING:
            self._dispatcher.on_replica_loading(replica_id, now_s)
        if update.was_ready:
            self._handle_ready(replica_id, update.node_id, now_s)
        for item in update.news:
            if isinstance(item, PieceBegun):
                self._dispatcher.on_piece_begun(replica_id, item)
            else:
                self._apply(self._dispatcher.on_report(replica_id, item))
        if update.state is ReplicaState.FAILED:
            self._handle_failed(replica_id, update)

    def _handle_ready(self, replica_id: int, node_id: str, now_s: float) -> None:
        num_ready = self._dispatcher.num_ready
        self._apply(self._dispatcher.on_replica_ready(replica_id, now_s, node_id))
        if self._dispatcher.num_ready > num_ready:
            logger.info("replica=%d ready; %d ready", replica_id, num_ready + 1)

    def _handle_failed(self, replica_id: int, update: ReplicaUpdate) -> None:
        """Its process lives, but its worker is gone."""
        code, message, trace = error = update.error or ("unknown", "", "")
        if not update.was_ready:
            self._give_up_start(replica_id, error)
            return
        self._fleet.kill(replica_id)
        loss = Loss.SUSPECT if code == ReplicaSuspect.__name__ else Loss.CRASH
        self._lose(replica_id, loss, f"{code}: {message}\n{trace}")

    def _give_up_start(self, replica_id: int, error: ErrorText) -> None:
        self._apply(self._dispatcher.on_replica_failed_to_start(replica_id, error, self._clock()))
        is_news = error[:2] not in self._told_start_errors  # a thousand replicas fail alike
        self._told_start_errors.add(error[:2])
        level = logging.WARNING if is_news else logging.DEBUG
        logger.log(level, "replica=%d could not start: %s: %s", replica_id, error[0], error[1])

    def _lose(self, replica_id: int, loss: Loss, detail: str) -> None:
        logger.warning("replica=%d lost, %s: %s", replica_id, loss.value, detail)
        self._retire(replica_id)
        self._apply(self._dispatcher.on_replica_lost(replica_id, loss, detail, self._clock()))

    def _retire(self, replica_id: int) -> None:
        done = self._progress.pop(replica_id, None)
        if done is not None:
            self._live -= Progress(num_running=done.num_running)

    def _collect_checks(self) -> None:
        for check in [check for check in self._checks if check.done()]:
            unit_index = self._checks.pop(check)
            self._apply(self._dispatcher.on_unit_checked(unit_index, check.result()))

    def _keep_time(self, now_s: float) -> None:
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + _TICK_S
            self._apply(self._dispatcher.on_tick(now_s))
        if now_s >= self._next_beat_s:
            self._next_beat_s = now_s + _BEAT_S
            self._hooks.on_beat()
        if now_s >= self._next_progress_s:
            self._next_progress_s = now_s + _PROGRESS_S
            self._hooks.on_progress(self._run_progress())

    def _drain_if_asked(self) -> None:
        if self._drain_deadline_s is None and self._hooks.should_stop():
            logger.info("stopping: %d leased units may still be committed", self._dispatcher.num_leased)
            self._apply(self._dispatcher.on_stop())
            self._drain_deadline_s = self._clock() + self._drain_grace_s
        if self._drain_deadline_s is None:
            return
        if not self._dispatcher.num_leased or self._clock() >= self._drain_deadline_s:
            self._hooks.on_progress(self._run_progress())  # what was committed while draining
            units = self._dispatcher.units
            raise Drained(
                f"stopped after {units.num_committed} of {units.num_units} units; "
                "the same command goes on from here"
            )

    # --- actions ---------------------------------------------------------------------------------

    def _apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Lease():
                    self._fleet.order(action.replica_id, self._unit_lease(action))
                case Cancel(replica_id, unit_index, attempt):
                    self._fleet.order(replica_id, CancelUnit(unit_index, attempt))
                case StartReplica(replica_id, avoided):
                    logger.debug("replica=%d starting", replica_id)
                    self._progress[replica_id] = Progress()
                    self._fleet.start(replica_id, avoided)
                case KillReplica(replica_id, reason):
                    logger.info("replica=%d ended: %s", replica_id, reason)
                    self._retire(replica_id)
                    self._fleet.kill(replica_id)
                case CheckCommitted(unit_index):
                    check = self._checker.submit(self._find_committed, self._unit(unit_index))
                    self._checks[check] = unit_index
                case Finish():
                    self._is_finished = True
                case Fail(error):
                    raise error

    def _unit_lease(self, lease: Lease) -> UnitLease:
        unit = self._unit(lease.unit_index)
        if lease.caution is not None:
            logger.info(
                "unit=%d attempt=%d: it took a replica down and runs in %d pieces; %d rows are left out",
                unit.index,
                lease.attempt,
                len(lease.caution.pieces),
                len(lease.caution.condemned),
            )
        return UnitLease(unit, lease.attempt, lease.caution, lease.trusts_nan)

    def _find_committed(self, unit: WorkUnit) -> UnitCounts | None:
        try:
            return self._hooks.find_committed(unit)
        except OSError as error:
            logger.warning("unit=%d: the store does not say if it is committed: %s", unit.index, error)
            return None

    def _unit(self, unit_index: int) -> WorkUnit:
        return self._units[bisect_left(self._units, unit_index, key=lambda unit: unit.index)]

    def _describe_unit(self, unit_index: int) -> str:
        unit = self._unit(unit_index)
        last_row = unit.first_row + unit.num_rows - 1
        return f"unit {unit_index} (rows {unit.first_row} to {last_row} of file {unit.file_index})"

    def _run_progress(self) -> RunProgress:
        dispatcher, units = self._dispatcher, self._dispatcher.units
        return RunProgress(
            units.num_units,
            units.num_committed,
            units.counts,
            units.num_attempts,
            units.num_rows_again,
            self._live,
            dispatcher.num_ready,
            dispatcher.num_starting,
            dispatcher.num_lost,
        )
