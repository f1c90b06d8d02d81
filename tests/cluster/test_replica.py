import threading

import pytest
from fake_worker import FakeWorker, make_units

from b2batch.cluster.replica import CancelUnit, Replica, ReplicaState, UnitLease

WAIT_S = 10.0


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(make_worker=None, **setting):
        replica = Replica(make_worker or FakeWorker(tmp_path, **setting))
        started.append(replica)
        return replica

    yield begin
    assert all(replica.stop(WAIT_S) for replica in started)


def ready(replica):
    while not (update := replica.poll(0, (), WAIT_S)).was_ready:
        assert update.state in (ReplicaState.STARTING, ReplicaState.LOADING)
    return replica


def leases(num_units, attempt=1):
    return tuple(UnitLease(unit, attempt) for unit in make_units(num_units))


def collect(replica, handed_in, num_wanted):
    """Reports until there are ``num_wanted``; every poll acknowledges the ones before."""
    update = replica.poll(0, handed_in, WAIT_S)
    reports = list(update.news)
    while len(reports) < num_wanted:
        update = replica.poll(update.num_news, (), WAIT_S)
        reports += update.news
    return reports, update


def test_each_leased_unit_is_reported_once_when_polls_are_acknowledged(start):
    reports, update = collect(ready(start()), leases(5), 5)
    assert sorted(report.unit_index for report in reports) == [0, 1, 2, 3, 4]
    assert all(report.newly_committed for report in reports)
    assert (update.num_news, update.progress.num_rows) == (5, 20)


def test_reports_of_a_lost_reply_are_told_again(start):
    replica = ready(start())
    reports, _ = collect(replica, leases(1), 1)
    assert replica.poll(0, (), WAIT_S).news == tuple(reports)
    assert replica.poll(1, (), 0.0).news == ()


def test_a_lease_handed_in_twice_is_computed_once(start):
    replica = ready(start(step_s=0.05))
    replica.poll(0, leases(2), 0.0)
    reports, _ = collect(replica, leases(2), 2)
    assert [report.newly_committed for report in reports] == [True, True]


def test_a_later_attempt_of_the_same_unit_is_computed(start):
    replica = ready(start())
    collect(replica, leases(1), 1)
    [report] = replica.poll(1, leases(1, attempt=2), WAIT_S).news
    assert (report.attempt, report.newly_committed) == (2, False)


def test_it_answers_while_its_worker_is_being_built(start, tmp_path):
    may_go_on = threading.Event()

    def slow_worker():
        may_go_on.wait(WAIT_S)
        return FakeWorker(tmp_path)()

    replica = start(slow_worker)
    assert replica.poll(0, (), 0.01).state in (ReplicaState.STARTING, ReplicaState.LOADING)
    may_go_on.set()
    ready(replica)


def test_a_worker_that_cannot_be_built_is_told_as_text(start):
    replica = start(harm="no start")
    while (update := replica.poll(0, (), WAIT_S)).state is not ReplicaState.FAILED:
        assert update.state in (ReplicaState.STARTING, ReplicaState.LOADING)
    assert not update.was_ready
    code, message, trace = update.error
    assert (code, message) == ("RuntimeError", "the checkpoint has no weights")
    assert "fake_worker.py" in trace


def test_a_step_that_raises_ends_the_replica_and_keeps_earlier_reports(start):
    replica = ready(start(harm="step raises", hurt_by=1))
    reports, update = collect(replica, leases(2), 1)
    while update.state is not ReplicaState.FAILED:
        update = replica.poll(0, (), WAIT_S)
    assert [report.unit_index for report in reports] == [0]
    assert (update.was_ready, update.error[1]) == (True, "device-side assert")


def test_a_unit_that_cannot_be_taken_fails_alone(start):
    reports, update = collect(ready(start(harm="unreadable", hurt_by=0)), leases(2), 2)
    errors = {report.unit_index: report.error for report in reports}
    assert errors[0][:2] == ("OSError", "the input is gone")
    assert errors[1] is None
    assert update.state is ReplicaState.READY


def test_receipts_wait_while_there_is_enough_to_do(start):
    update = ready(start(step_s=0.02)).poll(0, leases(8), WAIT_S)
    assert len(update.news) >= 4, "one call for several units"


def test_a_failed_attempt_does_not_wait(start):
    update = ready(start(step_s=0.2, harm="unreadable", hurt_by=1)).poll(0, leases(8), WAIT_S)
    assert update.news[0].error is not None


def test_a_cancelled_unit_is_not_computed(start, tmp_path):
    replica = ready(start(step_s=0.05))
    replica.poll(0, leases(6), 0.0)
    replica.poll(0, (CancelUnit(5, 1), CancelUnit(4, 1)), 0.0)
    reports, _ = collect(replica, (), 4)
    assert sorted(report.unit_index for report in reports) == [0, 1, 2, 3]
    assert replica.stop(WAIT_S)
    assert len(list(tmp_path.glob("part-*"))) == 4


def test_wake_ends_a_waiting_poll(start):
    replica = ready(start())
    threading.Timer(0.05, replica.wake).start()
    assert replica.poll(0, (), WAIT_S).news == ()


def test_stop_ends_after_the_step_under_way(start, tmp_path):
    replica = ready(start(step_s=0.05))
    replica.poll(0, leases(50), 0.0)
    assert replica.stop(WAIT_S)
    num_parts = len(list(tmp_path.glob("part-*")))
    assert num_parts < 50
    assert replica.poll(0, (), 0.0).num_news == num_parts
