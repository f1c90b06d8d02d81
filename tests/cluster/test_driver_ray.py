"""Real replicas on Ray: what a user sees when processes die, hang or cannot start."""

import os
import signal
import time

import pytest
from fake_worker import FakeWorker, find_committed, make_units, part_path

from b2batch.cluster.driver import RunHooks, run_units
from b2batch.cluster.fleet import Answer, RayFleet
from b2batch.cluster.placement import Placement
from b2batch.cluster.policy import DispatchPolicy
from b2batch.errors import ClusterError, Drained

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def run(
    worker,
    num_units,
    num_replicas=1,
    rows_per_unit=4,
    should_stop=lambda: False,
    on_progress=lambda _: None,
    num_cpus=1.0,
    **policy,
):
    placement = Placement(num_replicas, num_cpus=num_cpus, num_gpus=0.0)
    policy = {"start_timeout_s": 60.0, **policy}
    hooks = RunHooks(
        find_committed=lambda unit: find_committed(worker.store, unit),
        on_progress=on_progress,
        on_beat=lambda: None,
        should_stop=should_stop,
    )
    return run_units(
        make_units(num_units, rows_per_unit),
        RayFleet(placement, worker),
        DispatchPolicy(num_replicas=num_replicas, **policy),
        hooks,
        drain_grace_s=10.0,
    )


def committed(store):
    return len(list(store.glob("part-*")))


def replica_pids(store):
    return [int(path.name.removeprefix("pid-")) for path in store.glob("pid-*")]


def assert_gone(pids):
    deadline_s = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline_s, "a replica outlived its run"
        time.sleep(0.05)


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_every_unit_is_committed_and_no_replica_is_left(tmp_path, num_replicas):
    worker = FakeWorker(tmp_path, step_s=0.02)
    totals = run(worker, num_units=40, num_replicas=num_replicas, num_cpus=2.0)
    assert (committed(tmp_path), totals.counts.num_ok, totals.num_replicas_lost) == (40, 160, 0)
    threads = {path.read_text() for path in tmp_path.glob("pid-*")}
    assert threads == {"2"}, "torch finds its number of threads when it is imported"
    assert len(replica_pids(tmp_path)) == num_replicas
    assert_gone(replica_pids(tmp_path))


@pytest.mark.parametrize("harm", ["killed", "step raises"])
def test_a_replica_that_dies_in_the_middle_is_replaced(tmp_path, harm):
    worker = FakeWorker(tmp_path, harm=harm, hurt_by=7, step_s=0.01)
    totals = run(worker, num_units=30, num_replicas=2)
    assert (committed(tmp_path), totals.counts.num_ok, totals.num_replicas_lost) == (30, 120, 1)


def test_a_replica_that_hangs_is_replaced(tmp_path):
    worker = FakeWorker(tmp_path, harm="stopped", hurt_by=3)
    totals = run(worker, num_units=8, step_timeout_s=3.0)
    assert (committed(tmp_path), totals.counts.num_ok, totals.num_replicas_lost) == (8, 32, 1)


def test_a_row_that_kills_its_process_is_found_and_the_others_are_computed(tmp_path):
    worker = FakeWorker(tmp_path, poison=frozenset({(1, 250)}))
    totals = run(worker, num_units=4, rows_per_unit=250 + 1)
    assert (totals.counts.num_ok, totals.counts.num_error) == (4 * 251 - 1, 1)
    assert part_path(tmp_path, make_units(2)[1]).read_text().endswith("[250]")
    assert totals.num_replicas_lost == 4
    assert totals.num_attempts <= 12


def test_a_worker_that_cannot_be_built_ends_the_run_with_its_message_once(tmp_path):
    with pytest.raises(ClusterError) as raised:
        run(FakeWorker(tmp_path, harm="no start"), num_units=4, num_replicas=2)
    assert str(raised.value).partition("\n")[0].count("the checkpoint has no weights") == 1


def test_a_replica_starts_where_a_node_is_avoided(tmp_path):
    fleet = RayFleet(Placement(1, num_cpus=1.0, num_gpus=0.0), FakeWorker(tmp_path))
    fleet.start(0, frozenset({"0" * 56}))  # a node that is none of ours
    deadline_s = time.monotonic() + 60
    try:
        while not any(isinstance(event, Answer) for event in fleet.wait(1.0)):
            assert time.monotonic() < deadline_s
    finally:
        fleet.close(0.0)


def test_asked_to_stop_it_commits_what_is_leased_and_no_more(tmp_path):
    seen = []
    worker = FakeWorker(tmp_path, step_s=0.2)
    with pytest.raises(Drained):
        run(worker, num_units=500, on_progress=seen.append, should_stop=lambda: committed(tmp_path) >= 3)
    assert 3 <= committed(tmp_path) <= 10
    assert_gone(replica_pids(tmp_path))
    run(worker, num_units=5)  # the cluster is as good as new


def test_a_replica_killed_from_outside_costs_seconds(tmp_path):
    killed_s, recovered_s = [], []

    def kill_once(progress):
        if not killed_s and progress.num_committed >= 3:
            os.kill(replica_pids(tmp_path)[0], signal.SIGKILL)
            killed_s.append(time.monotonic())
        elif killed_s and not recovered_s and progress.num_lost and progress.num_ready:
            recovered_s.append(time.monotonic())

    totals = run(FakeWorker(tmp_path, step_s=0.2), num_units=20, on_progress=kill_once)
    assert (committed(tmp_path), totals.counts.num_ok, totals.num_replicas_lost) == (20, 80, 1)
    assert recovered_s[0] - killed_s[0] < 20
