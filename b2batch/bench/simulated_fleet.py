"""A thousand replicas that only pretend to work, for what they cost the driver.

On a simulated clock the driver's own code is measured; over Ray, its real calls are: one actor then
answers the polls of many stand-ins, so that the driver waits on as many references as in a real run.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from b2batch.bench.child import cpu_s, peak_bytes
from b2batch.bench.driver_scale import ScaleResult
from b2batch.bench.workload import DriverWorkload
from b2batch.cluster.driver import RunHooks, RunProgress, run_units
from b2batch.cluster.fleet import Answer, Fleet, FleetEvent, RayFleet
from b2batch.cluster.placement import Placement
from b2batch.cluster.policy import DispatchPolicy, poll_timeout_s
from b2batch.cluster.replica import Order, ReplicaState, ReplicaUpdate, UnitLease
from b2batch.errors import Drained, MeasurementFailed
from b2batch.rows import UnitCounts, UnitReport, WorkUnit
from b2batch.telemetry import Progress

_START_TIMEOUT_S = 600.0
_NUM_CROWDS = 2
_SETTLE_S = 5.0
_FEW_LEASES = 4  # two begun, one that is not, and the one that ends
_STEPS_PER_S = 20.0


@dataclass(slots=True)
class _StandIn:
    """A replica's answers without a replica: it finishes a unit every ``unit_s``, one after the other."""

    unit_s: float
    began_s: float
    leases: list[UnitLease] = field(default_factory=list)
    unit_ends_s: float = 0.0
    num_reports: int = 0

    def take(self, orders: Sequence[Order], now_s: float, first_share: float = 1.0) -> None:
        """Begin with the first lease if nothing is under way; what is to be left is done all the same."""
        leases = [order for order in orders if isinstance(order, UnitLease)]
        if leases and not self.leases:
            self.unit_ends_s = now_s + first_share * self.unit_s
        self.leases += leases

    def next_report_s(self) -> float:
        """When a replica would tell: as soon as a unit ends, but for those that have enough left to do."""
        num_waiting = max(0, len(self.leases) - _FEW_LEASES)
        return self.unit_ends_s + num_waiting * self.unit_s if self.leases else float("inf")

    def answer(self, now_s: float) -> ReplicaUpdate:
        """What a poll that returns now is told."""
        reports: list[UnitReport] = []
        while self.leases and self.unit_ends_s <= now_s:
            lease = self.leases.pop(0)
            reports.append(
                UnitReport(lease.unit.index, lease.attempt, UnitCounts(num_ok=lease.unit.num_rows))
            )
            self.unit_ends_s += self.unit_s
        self.num_reports += len(reports)
        num_rows = self.num_reports * 1000
        num_steps = int((now_s - self.began_s) * _STEPS_PER_S)
        progress = Progress(num_rows, 0, 100 * num_rows, 50 * num_rows, 64)
        return ReplicaUpdate(ReplicaState.READY, True, tuple(reports), self.num_reports, num_steps, progress)


# --- on a simulated clock ------------------------------------------------------------------------


class SimulatedFleet:
    """A ``Fleet`` whose clock jumps from answer to answer. Replicas begin one after the other."""

    def __init__(self, num_replicas: int, unit_s: float, poll_timeout_s: float) -> None:
        self.now_s = 0.0
        self.num_reports = 0
        self._unit_s = unit_s
        self._poll_timeout_s = poll_timeout_s
        self._first_share = 1.0 / num_replicas
        self._replicas: dict[int, _StandIn] = {}
        self._outbox: dict[int, list[Order]] = {}
        self._due: list[tuple[float, int]] = []  # when a poll is answered, by whom
        self._to_poll: list[int] = []

    def start(self, replica_id: int, avoided: frozenset[str]) -> None:
        """See ``Fleet``; it is ready at once."""
        self._replicas[replica_id] = _StandIn(self._unit_s, self.now_s)
        self._outbox[replica_id] = []
        heapq.heappush(self._due, (self.now_s, replica_id))

    def order(self, replica_id: int, order: Order) -> None:
        """See ``Fleet``."""
        self._outbox[replica_id].append(order)

    def kill(self, replica_id: int) -> None:
        """See ``Fleet``."""
        self._replicas.pop(replica_id, None)

    def wait(self, timeout_s: float) -> list[FleetEvent]:
        """See ``Fleet``."""
        self._poll()
        self.now_s = min(self.now_s + timeout_s, self._due[0][0]) if self._due else self.now_s + timeout_s
        events: list[FleetEvent] = []
        while self._due and self._due[0][0] <= self.now_s:
            _, replica_id = heapq.heappop(self._due)
            if replica_id in self._replicas:
                events.append(self._answer(replica_id))
        return events

    def close(self, grace_s: float) -> None:
        """See ``Fleet``."""
        self._replicas.clear()

    def _answer(self, replica_id: int) -> Answer:
        update = self._replicas[replica_id].answer(self.now_s)
        self.num_reports += len(update.news)
        self._to_poll.append(replica_id)
        return Answer(replica_id, update)

    def _poll(self) -> None:
        """Poll whoever has answered, with the leases that were made since."""
        for replica_id in self._to_poll:
            replica, orders = self._replicas[replica_id], self._outbox[replica_id]
            share = 1.0 if replica.num_reports else self._first_share * (replica_id + 1)
            replica.take(orders, self.now_s, share)
            orders.clear()
            answered_s = min(self.now_s + self._poll_timeout_s, replica.next_report_s())
            heapq.heappush(self._due, (answered_s, replica_id))
        self._to_poll.clear()


def drive_simulated(units: Sequence[WorkUnit], workload: DriverWorkload) -> ScaleResult:
    """The driver's loop for ``simulated_s`` of a simulated clock."""
    num_replicas = min(workload.num_replicas, len(units))
    fleet = SimulatedFleet(num_replicas, workload.unit_s, poll_timeout_s(num_replicas))
    return _drive(units, fleet, num_replicas, workload.simulated_s, lambda: fleet.now_s)


def _drive(
    units: Sequence[WorkUnit], fleet: Fleet, num_replicas: int, seconds: float, clock: Callable[[], float]
) -> ScaleResult:
    watch = _Watch(num_replicas, seconds, clock)
    hooks = RunHooks(
        find_committed=lambda unit: None,
        on_progress=watch.on_progress,
        on_beat=lambda: None,
        should_stop=watch.should_stop,
    )
    with suppress(Drained):
        policy = DispatchPolicy(num_replicas, _START_TIMEOUT_S)
        run_units(units, fleet, policy, hooks, drain_grace_s=0.0, clock=clock)
    if watch.result is None:
        raise MeasurementFailed(f"all {len(units)} units were done before {seconds:.0f} s: take more units")
    return watch.result


# --- over Ray ------------------------------------------------------------------------------------


class _Crowd:
    """An actor that answers the polls of many stand-ins, each as long as a real replica would."""

    def __init__(self, unit_s: float, num_replicas: int) -> None:
        self._unit_s = unit_s
        self._num_replicas = num_replicas
        self._replicas: dict[int, _StandIn] = {}

    async def poll(
        self, replica_id: int, num_known: int, orders: tuple[Order, ...], timeout_s: float
    ) -> ReplicaUpdate:
        """As ``Replica.poll``."""
        now_s = time.monotonic()
        is_new = replica_id not in self._replicas
        replica = self._replicas.setdefault(replica_id, _StandIn(self._unit_s, now_s))
        share = 1.0 if replica.num_reports else (replica_id % self._num_replicas + 1) / self._num_replicas
        replica.take(orders, now_s, share)
        if not is_new:
            await asyncio.sleep(max(0.0, min(timeout_s, replica.next_report_s() - now_s)))
        return replica.answer(time.monotonic())

    async def wake(self, replica_id: int) -> None:
        """As ``Replica.wake``, but the poll goes on: leases come with answers here."""

    async def stop(self, replica_id: int, timeout_s: float) -> bool:
        """As ``Replica.stop``."""
        return True


@dataclass(frozen=True, slots=True)
class _Method:
    """An actor's method with its first argument given."""

    method: Any
    replica_id: int

    def remote(self, *arguments: Any) -> Any:
        """Call it."""
        return self.method.remote(self.replica_id, *arguments)


class _Handle:
    """What ``RayFleet`` takes for the handle of one replica's actor."""

    def __init__(self, crowd: Any, replica_id: int) -> None:
        self.poll = _Method(crowd.poll, replica_id)
        self.wake = _Method(crowd.wake, replica_id)
        self.stop = _Method(crowd.stop, replica_id)


class _CrowdFleet(RayFleet):
    """The real fleet with stand-ins for its actors."""

    def __init__(self, placement: Placement, unit_s: float) -> None:
        super().__init__(placement, _no_worker)
        crowd = ray.remote(_Crowd).options(num_cpus=0, max_concurrency=placement.num_replicas + 1)
        self._crowds = [crowd.remote(unit_s, placement.num_replicas) for _ in range(_NUM_CROWDS)]

    def make_actor(self, replica_id: int, avoided: frozenset[str]) -> _Handle:
        """One more in a crowd."""
        return _Handle(self._crowds[replica_id % _NUM_CROWDS], replica_id)

    def kill_actor(self, actor: _Handle) -> None:
        """The crowds end with Ray."""


def _no_worker() -> Any:
    raise AssertionError("stand-ins build no worker")


class _Watch:
    """CPU time over ``seconds`` of the driver's clock, once every replica is ready and at work."""

    def __init__(self, num_replicas: int, seconds: float, clock: Callable[[], float]) -> None:
        self._num_replicas = num_replicas
        self._seconds = seconds
        self._clock = clock
        self._began_s = float("inf")
        self._cpu_before_s = self._wall_before_s = 0.0
        self._num_before = self._num_committed = 0
        self.result: ScaleResult | None = None

    def on_progress(self, progress: RunProgress) -> None:
        """Begin a few seconds after the last replica became ready: starting is not what is measured."""
        self._num_committed = progress.num_committed
        if progress.num_ready == self._num_replicas and self._began_s == float("inf"):
            self._began_s = self._clock() + _SETTLE_S

    def should_stop(self) -> bool:
        """Whether the time is over; then ``result`` stands."""
        seconds = self._clock() - self._began_s
        if seconds >= 0 and not self._wall_before_s:
            self._began_s += seconds
            self._cpu_before_s, self._wall_before_s = cpu_s(), time.perf_counter()
            self._num_before = self._num_committed
        if seconds < self._seconds:
            return False
        if self.result is None:
            self.result = self._measure(seconds)
        return True

    def _measure(self, seconds: float) -> ScaleResult:
        used_s, wall_s = cpu_s() - self._cpu_before_s, time.perf_counter() - self._wall_before_s
        facts = {"core_share": used_s / seconds, "seconds": seconds}
        num_reports = self._num_committed - self._num_before
        return ScaleResult("reports", num_reports, wall_s, used_s, peak_bytes(), facts)


def drive_on_ray(units: Sequence[WorkUnit], workload: DriverWorkload) -> ScaleResult:
    """The driver's loop over Ray for ``ray_s`` of real time."""
    num_replicas = min(workload.num_replicas, len(units))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        fleet = _CrowdFleet(Placement(num_replicas, 1.0, 0.0), workload.unit_s)
        return _drive(units, fleet, num_replicas, workload.ray_s, time.monotonic)
    finally:
        ray.shutdown()
