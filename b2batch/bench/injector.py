"""Faults, chosen by a seed and done to a running job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random

from b2batch.bench.driver_process import DriverProcess
from b2batch.bench.fault_cluster import FaultCluster
from b2batch.bench.flaky_store import StoreFault, StoreSwitch
from b2batch.bench.small_disk import SmallDisk

_LEASE_AGE_S = 120.0


class FaultKind(StrEnum):
    """What can be done to a run."""

    REPLICA_KILL = "replica kill -9"
    REPLICA_TERM = "replica SIGTERM"
    REPLICA_STOP = "replica SIGSTOP"
    DRIVER_KILL = "driver kill -9"
    DRIVER_TERM = "driver SIGTERM"
    DRIVER_INTERRUPT = "driver SIGINT twice"
    DRIVER_STOP = "driver SIGSTOP beyond its lease"
    TWIN = "second driver"
    RAYLET_KILL = "raylet kill -9, reaped"
    RAYLET_ZOMBIE = "raylet kill -9, unreaped"
    RAYLET_TERM = "raylet SIGTERM (preemption)"
    RAYLET_STOP = "raylet SIGSTOP"
    GCS_KILL = "GCS kill -9"
    DISK_FULL = StoreFault.FULL.value
    STORE_ERROR = StoreFault.FAILING.value
    REPLY_LOST = StoreFault.REPLY_LOST.value
    STORE_SLOW = StoreFault.SLOW.value


WEIGHTS = {
    FaultKind.REPLICA_KILL: 8,
    FaultKind.REPLICA_TERM: 3,
    FaultKind.REPLICA_STOP: 3,
    FaultKind.DRIVER_KILL: 4,
    FaultKind.DRIVER_TERM: 2,
    FaultKind.DRIVER_INTERRUPT: 1,
    FaultKind.DRIVER_STOP: 1,
    FaultKind.TWIN: 3,
    FaultKind.RAYLET_KILL: 2,
    FaultKind.RAYLET_ZOMBIE: 2,
    FaultKind.RAYLET_TERM: 1,
    FaultKind.RAYLET_STOP: 1,
    FaultKind.GCS_KILL: 1,
    FaultKind.DISK_FULL: 3,
    FaultKind.STORE_ERROR: 3,
    FaultKind.REPLY_LOST: 3,
    FaultKind.STORE_SLOW: 2,
}


class Deck:
    """Kinds of faults in random order by weight; each comes once before any comes again by chance."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._first = list(FaultKind)
        random.shuffle(self._first)

    def draw(self) -> FaultKind | None:
        """The next kind; None when there are no more."""
        if self._first and self._random.randrange(2):
            return self._first.pop()
        return self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]

    def put_back(self, kind: FaultKind) -> None:
        """There was nothing to do it to: it comes again later."""
        self._first.insert(0, kind)


@dataclass(frozen=True, slots=True)
class Twin:
    """A driver beside the run's own. ``holder``: while it works, this one must be refused with 99."""

    process: DriverProcess
    holder: DriverProcess | None


class Injector:
    """Does faults to one run: its cluster, its drivers and its store.

    ``start_driver`` starts the same command once more. What heals by itself later (a stopped process, a
    store fault) is ended by ``heal``, to be called often.
    """

    def __init__(
        self,
        random: Random,
        cluster: FaultCluster,
        switch: StoreSwitch,
        disk: SmallDisk,
        output: Path,
        start_driver: Callable[[], DriverProcess],
    ) -> None:
        self._random = random
        self._cluster = cluster
        self._switch = switch
        self._disk = disk
        self._output = output
        self._start_driver = start_driver
        self._due: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self.twins: list[Twin] = []
        self.is_replacing = False  # a driver is stopped and its successor has not got the lease yet

    def inject(self, kind: FaultKind, driver: DriverProcess) -> DriverProcess | None:
        """Do it now; returns the run's driver from now on, or None when there was nothing to do it to."""
        match kind:
            case FaultKind.REPLICA_KILL:
                return driver if self._signal_replica(signal.SIGKILL) else None
            case FaultKind.REPLICA_TERM:
                return driver if self._signal_replica(signal.SIGTERM) else None
            case FaultKind.REPLICA_STOP:
                return driver if self._signal_replica(signal.SIGSTOP) else None
            case FaultKind.DRIVER_KILL:
                driver.send(signal.SIGKILL)
            case FaultKind.DRIVER_TERM:
                driver.send(signal.SIGTERM)
            case FaultKind.DRIVER_INTERRUPT:
                driver.send(signal.SIGINT)
                time.sleep(0.3)
                driver.send(signal.SIGINT)
            case FaultKind.DRIVER_STOP:
                return self._replace_stopped(driver)
            case FaultKind.TWIN:
                return self._start_twin(driver)
            case FaultKind.RAYLET_KILL | FaultKind.RAYLET_ZOMBIE | FaultKind.RAYLET_TERM:
                return driver if self._end_raylet(kind) else None
            case FaultKind.RAYLET_STOP:
                return driver if self._stop_raylet() else None
            case FaultKind.GCS_KILL:
                self._cluster.kill_gcs()
            case FaultKind.DISK_FULL:
                self._disk.fill()
                self._after(self._random.uniform(1.0, 4.0), self._disk.free)
            case _:
                self._switch.turn_on(StoreFault(kind.value))
                self._after(self._random.uniform(1.0, 4.0), self._switch.turn_off)
        return driver

    def heal(self, *, everything: bool = False) -> None:
        """End what has lasted long enough, or ``everything``."""
        due, self._due = self._due, []
        for is_due, act in due:
            if everything or is_due():
                act()
            else:
                self._due.append((is_due, act))

    def _after(self, delay_s: float, act: Callable[[], None]) -> None:
        due_s = time.monotonic() + delay_s
        self._due.append((lambda: time.monotonic() >= due_s, act))

    def _signal_replica(self, number: signal.Signals) -> bool:
        pids = self._cluster.replica_pids()
        if not pids:
            return False
        pid = self._random.choice(pids)
        _send(pid, number)
        if number is signal.SIGSTOP:
            self._after(self._random.uniform(2.0, 12.0), lambda: _send(pid, signal.SIGCONT))
        return True

    def _end_raylet(self, kind: FaultKind) -> bool:
        pids = self._cluster.raylet_pids()
        if not pids:
            return False
        number = signal.SIGTERM if kind is FaultKind.RAYLET_TERM else signal.SIGKILL
        self._cluster.end_raylet(self._random.choice(pids), number, reap=kind is not FaultKind.RAYLET_ZOMBIE)
        self._after(self._random.uniform(0.0, 3.0), self._cluster.fill_up)
        return True

    def _stop_raylet(self) -> bool:
        """A node that freezes with its replicas, long enough to be declared dead; then it wakes."""
        pids = self._cluster.raylet_pids()
        if not pids:
            return False
        raylet = self._random.choice(pids)
        frozen = [raylet, *self._cluster.replica_pids_of(raylet)]
        for pid in frozen:
            _send(pid, signal.SIGSTOP)

        def wake() -> None:
            for pid in frozen:
                _send(pid, signal.SIGCONT)
            self._cluster.forget(raylet)  # declared dead, it ends by itself
            self._cluster.fill_up()

        self._after(self._random.uniform(8.0, 12.0), wake)
        return True

    def _start_twin(self, driver: DriverProcess) -> DriverProcess | None:
        if not self._has_lease(driver):
            return None
        self.twins.append(Twin(self._start_driver(), driver))
        return driver

    def _replace_stopped(self, driver: DriverProcess) -> DriverProcess | None:
        """Stop the driver, let its lease run out, start another; the old one goes on after a while."""
        if not self._has_lease(driver):
            return None
        driver.send(signal.SIGSTOP)
        self._age_lease()
        successor = self._start_driver()
        self.twins.append(Twin(driver, None))

        def go_on() -> None:
            self.is_replacing = False
            driver.send(signal.SIGCONT)

        self.is_replacing = True
        self._due.append((self._is_settled(successor), go_on))
        return successor

    def _is_settled(self, successor: DriverProcess) -> Callable[[], bool]:
        """Whether the successor has the lease, or will never have it."""
        give_up_s = time.monotonic() + _LEASE_AGE_S
        return lambda: (
            self._has_lease(successor) or successor.exit_code is not None or time.monotonic() > give_up_s
        )

    def _has_lease(self, driver: DriverProcess) -> bool:
        """Whether this driver took the newest epoch, and works."""
        owners = sorted(self._output.glob("__b2batch/*/epoch/*.json"))
        has = bool(owners) and f'"pid": {driver.pid},' in owners[-1].read_text()
        return has and driver.exit_code is None

    def _age_lease(self) -> None:
        """As if a minute had gone by: the store's own times are set back."""
        for pattern in ("__b2batch/*/epoch/*.json", "__b2batch/*/heartbeat.json"):
            for path in self._output.glob(pattern):
                then_s = path.stat().st_mtime - _LEASE_AGE_S
                os.utime(path, (then_s, then_s))


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it ended meanwhile
        return
