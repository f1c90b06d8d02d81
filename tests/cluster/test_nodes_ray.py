"""Nodes that die, are taken away, freeze and join while a whole job runs: every row once, by who is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from b2batch.bench.driver_process import DriverProcess
from b2batch.bench.fault_cluster import FaultCluster
from b2batch.outputs.footer import read_footer
from b2batch.proof import verify_output

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_ROWS = 240
# A replica soon comes to a row at which it waits for the test, so no machine is too quick or too slow.
GATE = """
import os, pathlib, time

def wait(row):
    if row["number"] % 40 >= 20:
        scratch = pathlib.Path(os.environ["B2_GATE"])
        (scratch / f"waits-{os.getpid()}").touch()
        while not (scratch / "go-on").exists():
            time.sleep(0.05)
    return row
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    """A head that carries nothing, and two nodes with room for one replica each."""
    cluster = FaultCluster(2, tmp_path_factory.mktemp("home"))
    cluster.environment["B2_GATE"] = str(tmp_path_factory.mktemp("gate"))
    with cluster:
        yield cluster


class Job:
    """A job on the cluster, whose replicas wait in the middle of it."""

    def __init__(self, directory: Path, cluster: FaultCluster, replicas: object) -> None:
        cluster.fill_up()  # the test before may have taken nodes
        self.output = directory / "out"
        file = directory / "job.json"
        self._gate = Path(cluster.environment["B2_GATE"])
        for path in self._gate.iterdir():
            path.unlink()
        rows = directory / "rows.jsonl"
        rows.write_text("\n".join(json.dumps({"number": number}) for number in range(NUM_ROWS)))
        document = {
            "model": {"model": "baichuan2-tiny"},
            "input": {"path": str(rows), "rows_per_unit": 10},
            "preprocess": {"function": "gate:wait", "source": GATE},
            "prompt": {"template": "第{{ number }}条"},
            "sampling": {"max_tokens": 2, "ignore_eos": True},
            "output": {"path": str(self.output)},
            "cluster": {"replicas": replicas},
        }
        file.write_text(json.dumps(document))
        self._driver = DriverProcess(directory, file, cluster.environment, "--address", cluster.address)

    def waits_for(self, num_replicas: int, pids: Callable[[], list[int]]) -> list[int]:
        """The replicas among ``pids`` that wait at the gate, once there are so many."""
        deadline_s = time.monotonic() + 240
        while len(found := [pid for pid in pids() if (self._gate / f"waits-{pid}").exists()]) < num_replicas:
            assert self._driver.exit_code is None, self._driver.tail()
            assert time.monotonic() < deadline_s, self._driver.tail()
            time.sleep(0.1)  # other processes work: there is nothing else to wait on
        return found

    def goes_on_to_its_end(self) -> None:
        (self._gate / "go-on").touch()
        assert self._driver.wait(240.0) == 0, self._driver.tail()

    def assert_every_row_is_there_once(self) -> None:
        numbers = pq.read_table(self.output, columns=["number"])["number"].to_pylist()
        assert sorted(numbers) == list(range(NUM_ROWS))
        assert verify_output(str(self.output)).problems == ()

    def committers(self) -> set[int]:
        footers = (read_footer(part.read_bytes(), part.name) for part in self.output.glob("part-*"))
        return {int(footer.worker_id.rpartition("-")[2]) for footer in footers}


def test_a_node_is_killed_and_another_joins(cluster: FaultCluster, tmp_path: Path) -> None:
    job = Job(tmp_path, cluster, replicas=[2, 3])
    stays, goes = cluster.raylet_pids()
    job.waits_for(2, cluster.replica_pids)
    survivors = cluster.replica_pids_of(stays)
    assert len(survivors) == 1, "one on each node"

    cluster.end_raylet(goes, signal.SIGKILL, reap=True)
    newcomers = job.waits_for(1, replicas_of_a_new_node(cluster))
    job.goes_on_to_its_end()

    job.assert_every_row_is_there_once()
    assert job.committers() & set(newcomers), "the node that joined has worked"
    assert job.committers() & set(survivors), "the replica that was not hurt has gone on"


def test_one_node_is_preempted_and_one_freezes(cluster: FaultCluster, tmp_path: Path) -> None:
    job = Job(tmp_path, cluster, replicas="auto")
    freezes, goes = cluster.raylet_pids()
    job.waits_for(2, cluster.replica_pids)

    cluster.end_raylet(goes, signal.SIGTERM, reap=True)
    newcomers = job.waits_for(1, replicas_of_a_new_node(cluster))
    frozen = [freezes, *cluster.replica_pids_of(freezes)]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    job.goes_on_to_its_end()

    assert job.committers() & set(newcomers)
    for pid in frozen:
        os.kill(pid, signal.SIGCONT)
    cluster.forget(freezes)
    job.assert_every_row_is_there_once()


def replicas_of_a_new_node(cluster: FaultCluster) -> Callable[[], list[int]]:
    """A node joins; the replicas that it has by then."""
    before = set(cluster.raylet_pids())
    cluster.fill_up()
    [joined] = set(cluster.raylet_pids()) - before
    return lambda: cluster.replica_pids_of(joined)
