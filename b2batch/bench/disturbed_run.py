"""One job under faults: started again until it is done, watched all the while, and checked at the end."""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from b2batch.bench.driver_process import DriverProcess
from b2batch.bench.fault_cluster import FaultCluster
from b2batch.bench.fault_job import NUM_REPLICAS, make_job
from b2batch.bench.fault_scratch import count_generated, switch_in
from b2batch.bench.injector import Deck, FaultKind, Injector
from b2batch.bench.invariants import OutputWatch, Row, check_exit, check_finished
from b2batch.bench.small_disk import SmallDisk
from b2batch.bench.workload import FaultsWorkload

_LEASES_PER_REPLICA = 3  # held, and a straggler's copy
_MAY_GO_ON = {1, 75, 99, 130, 143}  # exit codes after which the same command is right
_POLL_S = 0.1
_RUN_TIMEOUT_S = 1800.0  # of one run under faults; then it counts as a hang
_TWIN_TIMEOUT_S = 120.0
_WARM_UP_S = 20.0  # of a driver's life, before its memory is looked at


@dataclass(slots=True)
class Tally:
    """What was seen over all runs. ``recovery_s``: from a fault to the next new part, by kind."""

    faults: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[str] = field(default_factory=Counter)
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    rss_slopes: list[float] = field(default_factory=list)  # MB a minute, one a driver that lived long enough
    violations: list[str] = field(default_factory=list)
    num_runs: int = 0
    num_driver_starts: int = 0
    num_rows: int = 0
    num_rows_again: int = 0
    num_tokens_again: int = 0
    disturbed_s: float = 0.0


class DisturbedRun:
    """One job, from its first start to exit code 0; what is seen goes into ``tally``."""

    def __init__(
        self,
        scratch: Path,
        disk: SmallDisk,
        cluster: FaultCluster,
        workload: FaultsWorkload,
        tally: Tally,
        random: Random,
        deck: Deck,
        expected: Sequence[Row],
    ) -> None:
        self._scratch = scratch
        self._cluster = cluster
        self._workload = workload
        self._tally = tally
        self._random = random
        self._deck = deck
        self._expected = expected
        self._output = disk.path / f"out-{tally.num_runs}"
        self._watch = OutputWatch(self._output)
        self._injector = Injector(random, cluster, switch_in(scratch), disk, self._output, self._start)
        self._drivers: list[DriverProcess] = []
        self._waiting: list[tuple[FaultKind, float]] = []  # faults after which nothing new came yet
        self._num_in_flight_bound = 0
        self._rss: list[tuple[float, int]] = []
        self._store_suffered = False

    def go(self, deadline_s: float, on_progress: Callable[[str], None]) -> None:
        """Until the job is done; no faults any more after ``deadline_s``. No driver is left behind."""
        try:
            self._go(deadline_s, on_progress)
        finally:
            for driver in self._drivers:
                driver.end()

    def _go(self, deadline_s: float, on_progress: Callable[[str], None]) -> None:
        started_s = time.monotonic()
        count_generated(self._scratch)
        driver = self._start()
        while True:
            driver = self._live(driver, min(deadline_s, started_s + _RUN_TIMEOUT_S / 2), on_progress)
            code = driver.exit_code
            self._note_exit(driver, code)
            if code == 0 or self._tally.violations:
                break
            if time.monotonic() > started_s + _RUN_TIMEOUT_S:
                self._violate([f"I16: not done after {_RUN_TIMEOUT_S:.0f} s: {driver.tail()}"])
                break
            driver = self._restart()
        self._injector.heal(everything=True)
        self._end_twins()
        self._check_end()
        self._tally.disturbed_s += time.monotonic() - started_s
        self._tally.num_runs += 1
        on_progress(self._describe())

    def _start(self) -> DriverProcess:
        self._tally.num_driver_starts += 1
        job = self._scratch / f"{self._output.name}.json"
        job.write_text(json.dumps(make_job(self._scratch, self._output, self._workload)))
        address = ("--address", self._cluster.address)
        self._drivers.append(DriverProcess(self._scratch, job, self._cluster.environment, *address))
        return self._drivers[-1]

    def _restart(self) -> DriverProcess:
        if not self._cluster.is_alive:
            self._cluster.close()
            self._cluster.start()
        self._cluster.fill_up()
        return self._start()

    # --- while a driver lives --------------------------------------------------------------------

    def _live(
        self, driver: DriverProcess, deadline_s: float, on_progress: Callable[[str], None]
    ) -> DriverProcess:
        """Disturb it until it ends; the driver that ended, which may be its successor."""
        next_fault_s = time.monotonic() + self._gap_s()
        while driver.exit_code is None:
            time.sleep(_POLL_S)
            self._look(driver)
            self._injector.heal()
            now_s = time.monotonic()
            if now_s >= deadline_s:
                self._injector.heal(everything=True)
            elif now_s >= next_fault_s + self._patience_s and not self._injector.is_replacing:
                driver = self._disturb(driver, on_progress)
                next_fault_s = time.monotonic() + self._gap_s()
            if now_s > deadline_s + _RUN_TIMEOUT_S / 2:
                self._violate([f"I16: no end in calm weather: {driver.tail()}"])
                driver.end()
        self._rss_slope()
        return driver

    @property
    def _patience_s(self) -> float:
        """While no new rows came since the last fault: else drivers would die before they begin."""
        return self._workload.patience_s if self._waiting else 0.0

    def _gap_s(self) -> float:
        return self._random.uniform(0.5, 2 * self._workload.mean_gap_s - 0.5)

    def _disturb(self, driver: DriverProcess, on_progress: Callable[[str], None]) -> DriverProcess:
        kind = self._deck.draw() if self._cluster.is_alive else None
        if kind is None:
            return driver
        successor = self._injector.inject(kind, driver)
        if successor is None:
            self._deck.put_back(kind)
            return driver
        self._tally.faults[kind] += 1
        self._num_in_flight_bound += NUM_REPLICAS * _LEASES_PER_REPLICA * self._workload.rows_per_unit
        self._waiting.append((kind, time.monotonic()))
        self._store_suffered |= kind in (FaultKind.DISK_FULL, FaultKind.STORE_ERROR, FaultKind.REPLY_LOST)
        on_progress(f"faults: {self._tally.faults.total()}: {kind}; {self._watch.num_rows} rows are there")
        return successor

    def _look(self, driver: DriverProcess) -> None:
        num_parts = self._watch.num_parts
        self._violate(self._watch.look())
        self._judge_twins()
        now_s = time.monotonic()
        if self._watch.num_parts > num_parts:
            for kind, then_s in self._waiting:
                self._tally.recovery_s.setdefault(kind, []).append(now_s - then_s)
            self._waiting = []
        if not driver.is_stopped and now_s - driver.started_s > _WARM_UP_S:
            self._rss.append((now_s, driver.rss_bytes()))

    def _rss_slope(self) -> None:
        points = [(at_s, rss) for at_s, rss in self._rss if rss]
        self._rss = []
        if points and points[-1][0] - points[0][0] > _WARM_UP_S:
            slope, _ = statistics.linear_regression([p[0] for p in points], [p[1] for p in points])
            self._tally.rss_slopes.append(60 * slope / 1e6)

    # --- ends ------------------------------------------------------------------------------------

    def _note_exit(self, driver: DriverProcess, code: int | None) -> None:
        self._tally.exit_codes[str(code)] += 1
        if code is None or (code > 0 and code not in _MAY_GO_ON):
            self._violate([f"I10: exit code {code}: {driver.tail()}"])
        if code in (0, 75) and not self._store_suffered:
            self._violate(check_exit(self._output, code))
        if code and code > 0 and b"Traceback" in driver.log.read_bytes() and code != 1:
            self._violate([f"a traceback with exit code {code}: {driver.tail()}"])

    def _judge_twins(self) -> None:
        """I13: whoever comes while another holds the lease is refused."""
        for twin in [twin for twin in self._injector.twins if twin.process.exit_code is not None]:
            self._injector.twins.remove(twin)
            code = twin.process.exit_code
            self._tally.exit_codes[str(code)] += 1
            allowed = _MAY_GO_ON
            if twin.holder is not None and twin.holder.exit_code is None and not twin.holder.is_stopped:
                allowed = {99}
            if code is None or (code not in allowed and code >= 0):
                self._violate([f"I13: a second driver ended with {code}: {twin.process.tail()}"])

    def _end_twins(self) -> None:
        for twin in self._injector.twins:
            if twin.process.wait(_TWIN_TIMEOUT_S) is None:
                self._violate([f"I13: a second driver goes on for ever: {twin.process.tail()}"])
                twin.process.end()
        self._judge_twins()

    def _check_end(self) -> None:
        if self._tally.violations:
            return
        self._violate(self._watch.look())
        self._violate(check_finished(self._output, self._expected))
        self._check_again()
        num_rows, num_tokens = count_generated(self._scratch)
        committed = [row for row in self._expected if row["status"] == "ok"]
        num_again = max(0, num_rows - len(self._expected))
        self._tally.num_rows += len(self._expected)
        self._tally.num_rows_again += num_again
        self._tally.num_tokens_again += max(
            0, num_tokens - sum(row["num_generated_tokens"] for row in committed)
        )
        if num_again > self._num_in_flight_bound:
            self._violate([f"I15: {num_again} rows again, {self._num_in_flight_bound} were in flight"])

    def _check_again(self) -> None:
        """I12: the same command once more does nothing."""
        before = _tree(self._output)
        again = self._start()
        if again.wait(_TWIN_TIMEOUT_S) != 0 or _tree(self._output) != before:
            self._violate([f"I12: a finished run was not left alone: {again.tail()}"])

    def _violate(self, problems: Sequence[str]) -> None:
        self._tally.violations += [f"run {self._tally.num_runs}: {problem}" for problem in problems]

    def _describe(self) -> str:
        tally = self._tally
        return (
            f"faults: run {tally.num_runs} done; {tally.faults.total()} faults, {tally.num_driver_starts} "
            f"driver starts, {len(tally.violations)} violations"
        )


def _tree(directory: Path) -> dict[str, tuple[int, int]]:
    stats = {str(path): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
