"""Whole jobs on a real Ray cluster while its parts are killed: one fault of each kind, then a late zombie."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from b2batch.bench.disturbed_run import DisturbedRun, Tally
from b2batch.bench.driver_process import DriverProcess
from b2batch.bench.fault_cluster import FaultCluster
from b2batch.bench.fault_job import NUM_REPLICAS, make_job, run_calm
from b2batch.bench.fault_scratch import HOLD_VARIABLE, ledger_in, release_in, switch_in, token_in
from b2batch.bench.injector import Deck, FaultKind
from b2batch.bench.invariants import OutputWatch, Row, check_finished
from b2batch.bench.small_disk import SmallDisk
from b2batch.bench.workload import FaultsWorkload

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

# Each comes once new rows have come after the one before.
SCRIPT = [
    FaultKind.TWIN,
    FaultKind.REPLICA_KILL,
    FaultKind.DISK_FULL,
    FaultKind.DRIVER_STOP,
    FaultKind.REPLICA_STOP,
    FaultKind.REPLY_LOST,
    FaultKind.RAYLET_KILL,
    FaultKind.DRIVER_KILL,
    FaultKind.STORE_ERROR,
    FaultKind.DRIVER_TERM,
    FaultKind.GCS_KILL,
]
WORKLOAD = FaultsWorkload(
    kind="faults",
    description="One of each.",
    minutes=8,
    seed=int(os.environ.get("B2_CHAOS_SEED", "1")),
    rows=320,
    rows_per_unit=8,
    max_tokens=12,
    mean_gap_s=1.1,
    patience_s=120.0,
)
NUM_ZOMBIE_ROWS = 24
FENCED = "is no longer this driver's: epoch"


class Script(Deck):
    """The kinds in this order, and no more."""

    def __init__(self, kinds: Sequence[FaultKind]) -> None:
        self._left = list(reversed(kinds))

    def draw(self) -> FaultKind | None:
        return self._left.pop() if self._left else None

    def put_back(self, kind: FaultKind) -> None:
        self._left.append(kind)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[FaultCluster]:
    with FaultCluster(NUM_REPLICAS, scratch) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(cluster: FaultCluster, scratch: Path) -> list[Row]:
    return run_calm(scratch, cluster, WORKLOAD)


def wait_for(holds: Callable[[], object], timeout_s: float, driver: DriverProcess) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, driver.tail()
        time.sleep(0.05)  # other processes work: there is nothing else to wait on


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_commit_of_a_late_zombie_loses(cluster: FaultCluster, calm: list[Row], scratch: Path) -> None:
    """A replica whose node was declared dead commits what it has in hand when the run has ended."""
    output, job = scratch / "zombie", scratch / "zombie.json"
    document = make_job(scratch, output, WORKLOAD)
    document["input"]["limit"] = NUM_ZOMBIE_ROWS
    job.write_text(json.dumps(document))
    environment = cluster.environment | {HOLD_VARIABLE: "1"}
    driver = DriverProcess(scratch, job, environment, "--address", cluster.address)
    token = token_in(scratch)
    wait_for(lambda: token.exists() and token.read_text(), 120.0, driver)
    zombie = int(token.read_text())
    cluster.end_raylet(parent_of(zombie), signal.SIGKILL, reap=False)
    assert driver.wait(120.0) == 0, driver.tail()
    cluster.fill_up()
    watch, ledger = OutputWatch(output), ledger_in(scratch, zombie)
    watch.look()
    assert Path(f"/proc/{zombie}").exists(), "it lives on without its node"
    before_ns = ledger.stat().st_mtime_ns
    release_in(scratch).touch()
    wait_for(lambda: ledger.stat().st_mtime_ns > before_ns, 30.0, driver)  # its commit is over
    assert [*watch.look(), *check_finished(output, calm[:NUM_ZOMBIE_ROWS])] == []


def test_one_fault_of_each_kind_and_every_row_once(
    cluster: FaultCluster, calm: list[Row], scratch: Path
) -> None:
    tally, told = Tally(), []
    script = Script(SCRIPT)
    with SmallDisk(scratch / "disk", switch_in(scratch)) as disk:
        run = DisturbedRun(scratch, disk, cluster, WORKLOAD, tally, Random(WORKLOAD.seed), script, calm)
        run.go(time.monotonic() + 60 * WORKLOAD.minutes, told.append)
    timeline = "\n".join(told)
    assert tally.violations == [], timeline
    assert list(tally.faults) == SCRIPT, timeline
    assert tally.exit_codes["99"] >= 1, "the second driver was refused"
    assert tally.exit_codes["75"] == 1, "the driver that was asked to stop did so"
    logs = [path.read_text() for path in scratch.glob("driver-*.log")]
    assert any(FENCED in log for log in logs), "the driver that was stopped beyond its lease"
