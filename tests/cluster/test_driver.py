"""The driver's loop with replicas as threads of this process and a clock of its own."""

import pytest
from fake_worker import FakeWorker, find_committed, make_units

from b2batch.cluster.driver import RunHooks, run_units
from b2batch.cluster.fleet import Answer, Lost
from b2batch.cluster.policy import DispatchPolicy, Loss
from b2batch.cluster.replica import Replica
from b2batch.errors import Drained, Fenced, IntegrityError, UnitFailed


class ThreadFleet:
    """Replicas in this process. ``dies_at``: the poll at which the first replica is lost."""

    def __init__(self, make_worker, dies_at=None):
        self.make_worker, self.dies_at = make_worker, dies_at
        self.replicas, self.known, self.outbox = {}, {}, {}
        self.num_waits, self.now_s = 0, 0.0
        self.closed = False

    def start(self, replica_id, avoided):
        self.replicas[replica_id] = Replica(self.make_worker)
        self.known[replica_id], self.outbox[replica_id] = 0, []

    def order(self, replica_id, order):
        self.outbox[replica_id].append(order)

    def kill(self, replica_id):
        self.replicas.pop(replica_id).stop(10.0)

    def wait(self, timeout_s):
        self.num_waits += 1
        self.now_s += timeout_s
        if self.num_waits == self.dies_at:
            self.kill(0)
            return [Lost(0, Loss.CRASH, "told by the test")]
        return [Answer(replica_id, self.poll(replica_id)) for replica_id in self.replicas]

    def poll(self, replica_id):
        leases, self.outbox[replica_id] = tuple(self.outbox[replica_id]), []
        update = self.replicas[replica_id].poll(self.known[replica_id], leases, 0.05)
        self.known[replica_id] = update.num_news
        return update

    def close(self, grace_s):
        self.closed = True
        for replica_id in list(self.replicas):
            self.kill(replica_id)


@pytest.fixture
def run(tmp_path):
    fleets = []

    def go(num_units=6, num_replicas=2, dies_at=None, worker=None, drain_grace_s=30.0, **hooks):
        fleet = ThreadFleet(worker or FakeWorker(tmp_path), dies_at)
        fleets.append(fleet)
        given = {
            "find_committed": lambda unit: find_committed(tmp_path, unit),
            "on_progress": lambda progress: None,
            "on_beat": lambda: None,
            "should_stop": lambda: False,
        }
        policy = DispatchPolicy(num_replicas=num_replicas, start_timeout_s=600.0)
        return run_units(
            make_units(num_units),
            fleet,
            policy,
            RunHooks(**given | hooks),
            drain_grace_s=drain_grace_s,
            clock=lambda: fleet.now_s,
        )

    yield go
    assert all(fleet.closed for fleet in fleets)


def committed(store):
    return len(list(store.glob("part-*")))


def test_progress_ends_at_the_totals(run, tmp_path):
    seen = []
    totals = run(on_progress=seen.append)
    assert (committed(tmp_path), totals.counts.num_ok) == (6, 24)
    assert (seen[-1].num_committed, seen[-1].counts) == (6, totals.counts)
    assert seen[-1].live.num_rows >= 24, "all rows, and again those of a straggler's copy"
    assert [p.num_committed for p in seen] == sorted(p.num_committed for p in seen)


def test_units_may_be_any_part_of_the_plan(tmp_path):
    units = [unit for unit in make_units(20) if unit.index % 3]
    fleet = ThreadFleet(FakeWorker(tmp_path))
    hooks = RunHooks(lambda unit: None, lambda progress: None, lambda: None, lambda: False)
    policy = DispatchPolicy(num_replicas=2, start_timeout_s=60.0)
    run_units(units, fleet, policy, hooks, drain_grace_s=1.0, clock=lambda: fleet.now_s)
    assert {int(path.name[5:]) for path in tmp_path.glob("part-*")} == {unit.index for unit in units}


def test_a_store_that_does_not_answer_costs_work_and_no_row(run, tmp_path):
    def unreachable(unit):
        raise OSError("503")

    totals = run(dies_at=3, find_committed=unreachable, worker=FakeWorker(tmp_path, step_s=0.02))
    assert (committed(tmp_path), totals.counts.num_ok, totals.num_replicas_lost) == (6, 24, 1)


def test_a_foreign_part_in_the_store_ends_the_run(run, tmp_path):
    def foreign(unit):
        raise IntegrityError("part-000000 is of another run")

    with pytest.raises(IntegrityError):
        run(
            num_units=100,
            dies_at=3,
            find_committed=foreign,
            worker=FakeWorker(tmp_path, step_s=0.05),
            num_replicas=1,
        )


def test_a_fenced_driver_stops(run):
    beats = []

    def beat():
        beats.append(1)
        if len(beats) == 2:
            raise Fenced("epoch 4 is there")

    with pytest.raises(Fenced):
        run(num_units=10_000, on_beat=beat)


def test_draining_keeps_what_is_leased_and_takes_nothing_new(run, tmp_path):
    with pytest.raises(Drained, match="of 1000 units"):
        run(
            num_units=1000,
            worker=FakeWorker(tmp_path, step_s=0.02),
            should_stop=lambda: committed(tmp_path) >= 5,
        )
    assert 5 <= committed(tmp_path) < 20


def test_draining_ends_when_the_grace_is_over(run, tmp_path):
    worker = FakeWorker(tmp_path, step_s=0.5)
    with pytest.raises(Drained):
        run(num_units=50, num_replicas=1, worker=worker, should_stop=lambda: True, drain_grace_s=0.0)
    assert committed(tmp_path) <= 1


def test_a_unit_that_fails_everywhere_names_its_rows(run, tmp_path):
    worker = FakeWorker(tmp_path, harm="unreadable", hurt_by=2)
    with pytest.raises(
        UnitFailed, match=r"unit 2 \(rows 8 to 11 of file 0\): failed 3 times.*the input is gone"
    ):
        run(worker=worker)
