import pytest

from b2batch.cluster.actions import (
    Cancel,
    CheckCommitted,
    Fail,
    Finish,
    KillReplica,
    Lease,
    StartReplica,
)
from b2batch.cluster.dispatch import Dispatcher
from b2batch.cluster.policy import DispatchPolicy, Loss
from b2batch.errors import ClusterError, DriftError, ModelError, StorageFull, UnitFailed
from b2batch.rows import UnitCounts, UnitReport

ONE_ROW = UnitCounts(num_ok=1)


def make(num_units=10, num_replicas=2, **policy):
    policy = {"start_timeout_s": 60.0, **policy}
    return Dispatcher(range(num_units), DispatchPolicy(num_replicas=num_replicas, **policy))


def started(num_units=10, num_replicas=2, **policy):
    """A dispatcher whose replicas are all ready, and the leases they got."""
    dispatcher = make(num_units, num_replicas, **policy)
    starts = dispatcher.start(0.0)
    leases = [lease for s in starts for lease in dispatcher.on_replica_ready(s.replica_id, 0.0)]
    return dispatcher, leases


def done(lease, counts=ONE_ROW):
    return lease.replica_id, UnitReport(lease.unit_index, lease.attempt, counts)


def failed(lease, code="OSError", message="no luck"):
    return lease.replica_id, UnitReport(
        lease.unit_index, lease.attempt, error=(code, message, "Traceback: x")
    )


def storage_full(lease):
    return failed(lease, "StorageFull", "no space left")


def of(kind, actions):
    return [action for action in actions if isinstance(action, kind)]


def run_to_end(dispatcher, leases):
    """Every lease is answered at once; the last actions."""
    todo = list(leases)
    actions = []
    while todo:
        actions = dispatcher.on_report(*done(todo.pop(0)))
        todo += of(Lease, actions)
    return actions


@pytest.mark.parametrize(("num_units", "num_replicas"), [(1, 1), (1, 5), (10, 2), (100_000, 100)])
def test_all_units_are_computed_once_when_nothing_fails(num_units, num_replicas):
    dispatcher, leases = started(num_units, num_replicas)
    assert run_to_end(dispatcher, leases) == [Finish()]
    assert dispatcher.units.counts.num_ok == num_units


def test_nothing_to_do_finishes_without_a_replica():
    assert make(0).start(0.0) == [Finish()]


def test_no_more_replicas_than_units():
    assert make(num_units=1, num_replicas=8).start(0.0) == [StartReplica(0)]


def test_a_replica_holds_at_most_max_leases():
    dispatcher, leases = started(num_units=10, num_replicas=1, max_leases=3)
    assert len(leases) == 3
    assert len(of(Lease, dispatcher.on_report(*done(leases[0])))) == 1


def test_units_of_a_lost_replica_are_checked_then_leased_again():
    dispatcher, leases = started(num_units=4)
    lost = [lease.unit_index for lease in leases if lease.replica_id == 0]
    actions = dispatcher.on_replica_lost(0, Loss.NODE, "gone", 1.0)
    assert actions == [*map(CheckCommitted, lost), StartReplica(2)]
    dispatcher.on_unit_checked(lost[0], None)
    dispatcher.on_unit_checked(lost[1], ONE_ROW)
    assert dispatcher.on_replica_ready(2, 2.0) == [Lease(2, lost[0], 2)]
    assert dispatcher.units.num_committed == 1


def test_waiting_replicas_take_what_came_back():
    dispatcher, leases = started(num_units=2, max_leases=1)
    dispatcher.on_report(*done(leases[0]))
    dispatcher.on_replica_lost(1, Loss.NODE, "", 1.0)
    assert of(Lease, dispatcher.on_unit_checked(leases[1].unit_index, None)) == [
        Lease(0, leases[1].unit_index, 2)
    ]


def test_a_late_commit_of_a_replaced_replica_counts_and_a_late_failure_does_not():
    dispatcher, leases = started(num_units=2, num_replicas=1)
    dispatcher.on_replica_lost(0, Loss.HANG, "", 1.0)
    for lease in leases:
        dispatcher.on_unit_checked(lease.unit_index, None)
    again = dispatcher.on_replica_ready(1, 2.0)
    assert dispatcher.on_report(*failed(leases[0])) == []
    assert dispatcher.on_report(*done(leases[1])) == []
    assert dispatcher.units.num_committed == 1
    assert dispatcher.on_report(*done(again[0])) == [Finish()]
    assert dispatcher.units.counts.num_ok == 2


def test_a_failed_unit_is_tried_on_another_replica():
    dispatcher, leases = started(num_units=2, max_leases=1)
    dispatcher.on_report(*done(leases[1]))
    assert dispatcher.on_report(*failed(leases[0])) == [Lease(1, leases[0].unit_index, 2)]


def test_a_unit_that_always_fails_ends_the_run_with_its_error():
    dispatcher, [lease] = started(num_units=1, num_replicas=1)
    for _ in range(2):
        [lease] = dispatcher.on_report(*failed(lease))
    [fail] = dispatcher.on_report(*failed(lease, message="disk on fire"))
    assert isinstance(fail.error, UnitFailed)
    assert "unit 0" in str(fail.error)
    assert "disk on fire" in str(fail.error)


def test_an_error_that_no_retry_mends_ends_the_run_at_once_as_itself():
    dispatcher, [lease] = started(num_units=1, num_replicas=1)
    [fail] = dispatcher.on_report(*failed(lease, code="DriftError", message="rows.jsonl changed"))
    assert isinstance(fail.error, DriftError)


def test_a_unit_that_kills_before_a_row_begins_is_named():
    dispatcher, [lease] = started(num_units=1, num_replicas=1)
    now_s, fails = 0.0, []
    while not fails:
        now_s += 31.0
        actions = dispatcher.on_replica_lost(lease.replica_id, Loss.CRASH, "signal 9", now_s)
        fails = of(Fail, dispatcher.on_unit_checked(0, None))
        for start in of(StartReplica, actions + dispatcher.on_tick(now_s + 30)):
            [lease] = dispatcher.on_replica_ready(start.replica_id, now_s) or [None]
    assert isinstance(fails[0].error, ClusterError)
    assert "unit 0: 3 replicas died before a row" in str(fails[0].error)
    assert "signal 9" in str(fails[0].error)


@pytest.mark.parametrize("loss", [Loss.NODE, Loss.MEMORY])
def test_a_dead_node_is_not_held_against_its_units(loss):
    dispatcher, [lease] = started(num_units=1, num_replicas=1)
    for round_ in range(4):
        now_s = 100.0 * (round_ + 1)
        actions = dispatcher.on_replica_lost(lease.replica_id, loss, "", now_s)
        assert dispatcher.on_unit_checked(0, None) == []
        [start] = of(StartReplica, actions + dispatcher.on_tick(now_s + 31))
        [lease] = dispatcher.on_replica_ready(start.replica_id, now_s + 31)
    assert dispatcher.on_report(*done(lease)) == [Finish()]


def test_deaths_without_a_commit_spend_the_budget_and_a_commit_restores_it():
    dispatcher, _ = started(num_units=100, num_replicas=1)
    num_deaths, now_s, replica_id = 0, 0.0, 0
    while True:
        actions = dispatcher.on_replica_lost(replica_id, Loss.NODE, "gone", now_s)
        num_deaths += 1
        if of(Fail, actions):
            break
        now_s += 31
        [start] = of(StartReplica, actions + dispatcher.on_tick(now_s))
        replica_id = start.replica_id
        leases = dispatcher.on_replica_ready(replica_id, now_s)
        if num_deaths == 5:
            dispatcher.on_report(*done(leases[0]))
    assert num_deaths == 5 + 7


def test_repeated_deaths_are_replaced_more_and_more_slowly():
    dispatcher, _ = started(num_replicas=1)
    assert of(StartReplica, dispatcher.on_replica_lost(0, Loss.CRASH, "", 1.0))
    dispatcher.on_replica_ready(1, 2.0)
    assert not of(StartReplica, dispatcher.on_replica_lost(1, Loss.CRASH, "", 3.0))
    assert not of(StartReplica, dispatcher.on_tick(3.5))
    assert of(StartReplica, dispatcher.on_tick(4.0))


def test_a_model_that_cannot_load_ends_the_run_with_its_own_words():
    dispatcher = make(num_replicas=2)
    dispatcher.start(0.0)
    error = ("RuntimeError", "no kernel image", "Traceback: y")
    assert not of(Fail, dispatcher.on_replica_failed_to_start(0, error, 1.0))
    [fail] = of(Fail, dispatcher.on_replica_failed_to_start(1, error, 1.0))
    assert isinstance(fail.error, ClusterError)
    assert str(fail.error).count("no kernel image") == 1


def test_the_callers_fault_at_start_keeps_its_class():
    dispatcher = make(num_replicas=4)
    dispatcher.start(0.0)
    [fail] = of(Fail, dispatcher.on_replica_failed_to_start(0, ("ModelError", "no config.json", ""), 1.0))
    assert isinstance(fail.error, ModelError)


def test_half_the_replicas_may_fail_to_start():
    dispatcher = make(num_units=8, num_replicas=4)
    dispatcher.start(0.0)
    leases, error = [], ("RuntimeError", "bad device", "")
    for replica_id in (0, 1):
        assert not of(Fail, dispatcher.on_replica_failed_to_start(replica_id, error, 1.0))
    for replica_id in (2, 3):
        leases += dispatcher.on_replica_ready(replica_id, 2.0)
    assert run_to_end(dispatcher, leases) == [Finish()]


def test_no_replica_in_time_ends_the_run():
    dispatcher = make(start_timeout_s=60.0)
    dispatcher.start(0.0)
    now_s = 0.0
    while not (fails := of(Fail, dispatcher.on_tick(now_s))):
        now_s += 1.0
    assert now_s == 60.0
    assert isinstance(fails[0].error, ClusterError)


def tick_until(dispatcher, now_s, kind, until_s):
    while now_s < until_s:
        now_s += 1.0
        if found := of(kind, dispatcher.on_tick(now_s)):
            return now_s, found
    return now_s, []


def test_a_silent_replica_with_leases_is_killed_and_replaced():
    dispatcher, _ = started(num_units=4, num_replicas=1, step_timeout_s=20.0)
    dispatcher.on_heartbeat(0, 1, 5.0)
    now_s, kills = tick_until(dispatcher, 0.0, KillReplica, 100.0)
    assert (now_s, kills[0].replica_id) == (25.0, 0)
    assert dispatcher.num_starting == 1


def test_among_many_replicas_silence_is_borne_longer():
    """They answer more seldom where they have no news."""
    dispatcher, _ = started(num_units=4000, num_replicas=1000)
    now_s, _ = tick_until(dispatcher, 0.0, KillReplica, 300.0)
    assert now_s == 260.0


def test_ready_and_starting_replicas_are_told_apart_through_losses():
    dispatcher, _ = started(num_units=20, num_replicas=3)
    assert (dispatcher.num_ready, dispatcher.num_starting) == (3, 0)
    [start] = of(StartReplica, dispatcher.on_replica_lost(1, Loss.CRASH, "", 1.0))
    assert (dispatcher.num_ready, dispatcher.num_starting) == (2, 1)
    dispatcher.on_replica_lost(1, Loss.CRASH, "told twice", 1.0)
    dispatcher.on_replica_ready(start.replica_id, 2.0)
    dispatcher.on_replica_ready(start.replica_id, 2.0)
    assert (dispatcher.num_ready, dispatcher.num_starting) == (3, 0)
    dispatcher.on_replica_failed_to_start(0, ("E", "its worker broke late", ""), 3.0)
    assert dispatcher.num_ready == 2


def test_a_replica_that_answers_but_does_not_move_is_killed_later():
    dispatcher, _ = started(num_units=4, num_replicas=1, step_timeout_s=50.0)
    killed_s = None
    for now_s in range(1, 100):
        dispatcher.on_heartbeat(0, 7, float(now_s))
        if of(KillReplica, dispatcher.on_tick(float(now_s))):
            killed_s = now_s
            break
    assert killed_s == 51


def test_a_driver_that_slept_blames_nobody():
    dispatcher, _ = started(num_units=4, num_replicas=1, step_timeout_s=20.0)
    assert dispatcher.on_tick(1.0) == []
    assert dispatcher.on_tick(5000.0) == []


def test_a_straggler_is_copied_once_and_the_first_commit_wins():
    dispatcher, leases = started(num_units=3, num_replicas=2, max_leases=1)
    slow = next(lease for lease in leases if lease.replica_id == 1)
    dispatcher.on_tick(1.0)
    lease = next(lease for lease in leases if lease.replica_id == 0)
    while lease is not None:
        lease = next(iter(of(Lease, dispatcher.on_report(*done(lease)))), None)
    assert of(Lease, dispatcher.on_tick(1.2)) == []
    [copy] = of(Lease, dispatcher.on_tick(2.0))
    assert copy == Lease(0, slow.unit_index, 2)
    assert of(Lease, dispatcher.on_tick(9.0)) == []
    assert dispatcher.on_report(*done(copy)) == [Finish()]
    assert dispatcher.on_report(*done(slow)) == []
    assert dispatcher.units.counts.num_ok == 3


def with_a_copy():
    """Unit 2 of 3 is held twice, by replica 1 and, as a copy, by another; the rest is committed."""
    dispatcher, leases = started(num_units=3, num_replicas=3)
    [slow] = [lease for lease in leases if lease.replica_id == 1]
    dispatcher.on_tick(1.0)
    for lease in leases:
        if lease is not slow:
            dispatcher.on_report(*done(lease))
    [copy] = of(Lease, dispatcher.on_tick(3.0))
    assert copy.unit_index == slow.unit_index == 2
    return dispatcher, slow, copy


def test_a_failed_copy_is_not_retried_while_the_first_lease_runs():
    dispatcher, slow, copy = with_a_copy()
    assert dispatcher.on_report(*failed(copy)) == []
    assert of(Lease, dispatcher.on_tick(4.0)) == []
    assert dispatcher.on_report(*done(slow)) == [Finish()]


def test_a_unit_lost_by_both_its_holders_is_leased_once():
    dispatcher, slow, copy = with_a_copy()
    checks = [
        *dispatcher.on_replica_lost(slow.replica_id, Loss.NODE, "", 4.0),
        *dispatcher.on_replica_lost(copy.replica_id, Loss.NODE, "", 4.0),
    ]
    answers = [dispatcher.on_unit_checked(check.unit_index, None) for check in of(CheckCommitted, checks)]
    leases = [lease for actions in answers for lease in of(Lease, actions)]
    assert [lease.unit_index for lease in leases] == [slow.unit_index]


def test_a_unit_waits_for_no_replica_that_is_gone():
    dispatcher, leases = started(num_units=2, num_replicas=2, max_leases=1)
    mine, other = sorted(leases, key=lambda lease: lease.replica_id)
    assert dispatcher.on_report(*failed(mine)) == []  # better on the other, once that has room
    actions = dispatcher.on_replica_lost(other.replica_id, Loss.NODE, "", 1.0)
    assert of(Lease, actions) == [Lease(mine.replica_id, mine.unit_index, 2)]


def test_among_many_replicas_each_holds_more_units_and_two_are_begun():
    dispatcher = make(num_units=5000, num_replicas=500)
    start, *_ = dispatcher.start(0.0)
    leases = dispatcher.on_replica_ready(start.replica_id, 0.0)
    assert len(leases) == 6
    again = dispatcher.on_replica_lost(start.replica_id, Loss.CRASH, "signal 11", 1.0)
    for check in of(CheckCommitted, again):
        dispatcher.on_unit_checked(check.unit_index, None)
    blamed = [lease.unit_index for lease in leases if dispatcher.units.is_quarantined(lease.unit_index)]
    assert blamed == [lease.unit_index for lease in leases[:2]]


def test_draining_calls_off_what_is_not_begun():
    dispatcher, leases = started(num_units=10, num_replicas=1, max_leases=4)
    calls_off = dispatcher.on_stop()
    assert calls_off == [Cancel(0, lease.unit_index, 1) for lease in leases[2:]]
    assert dispatcher.num_leased == 2


def test_draining_leases_and_starts_nothing_more():
    dispatcher, leases = started(num_units=10)
    dispatcher.on_stop()
    assert dispatcher.on_report(*done(leases[0])) == []
    assert of(StartReplica, dispatcher.on_replica_lost(1, Loss.CRASH, "", 1.0)) == []
    assert dispatcher.on_tick(2.0) == []


def test_what_waits_behind_another_unit_is_taken_over_at_once():
    dispatcher = make(num_units=2, num_replicas=2)
    first, second = dispatcher.start(0.0)
    held = dispatcher.on_replica_ready(first.replica_id, 0.0)
    assert dispatcher.on_replica_ready(second.replica_id, 0.0) == []
    [copy] = of(Lease, dispatcher.on_tick(0.5))
    assert (copy.replica_id, copy.unit_index) == (second.replica_id, held[1].unit_index)
    cancelled = dispatcher.on_report(*done(copy))
    assert cancelled == [Cancel(first.replica_id, copy.unit_index, 1)]
    assert dispatcher.on_report(*done(held[0])) == [Finish()]
    assert dispatcher.units.counts.num_ok == 2
    assert (dispatcher.units.num_attempts, dispatcher.units.num_rows_again) == (3, 1)


def test_a_full_output_makes_everybody_wait_and_is_tried_again():
    dispatcher, leases = started(num_units=8, num_replicas=2, max_leases=1)
    assert dispatcher.on_report(*storage_full(leases[0])) == []
    assert dispatcher.on_report(*done(leases[1])) == []
    assert of(Lease, dispatcher.on_tick(4.0)) == []
    again = of(Lease, dispatcher.on_tick(5.0))
    assert leases[0].unit_index in {lease.unit_index for lease in again}
    assert run_to_end(dispatcher, again) == [Finish()]


def test_an_output_that_stays_full_ends_the_run_as_what_it_is():
    dispatcher, [lease] = started(num_units=1, num_replicas=1)
    now_s = 0.0
    for _ in range(3):
        assert dispatcher.on_report(*storage_full(lease)) == []
        now_s += 20.0
        [lease] = dispatcher.on_tick(now_s)
    [fail] = dispatcher.on_report(*storage_full(lease))
    assert isinstance(fail.error, StorageFull)
    assert "no space left" in str(fail.error)


def test_a_node_on_which_replicas_only_die_is_avoided_until_one_works_there():
    dispatcher = make(num_units=100, num_replicas=1)
    [start] = dispatcher.start(0.0)
    now_s = 0.0
    for _ in range(3):
        assert start.avoided == frozenset()
        dispatcher.on_replica_ready(start.replica_id, now_s, "node-a")
        now_s += 31.0
        actions = dispatcher.on_replica_lost(start.replica_id, Loss.CRASH, "", now_s)
        [start] = of(StartReplica, actions + dispatcher.on_tick(now_s + 30))
    assert start.avoided == {"node-a"}


def test_replicas_that_die_while_they_start_end_the_run_soon():
    dispatcher = make(num_replicas=2)
    starts, now_s, num_deaths = dispatcher.start(0.0), 0.0, 0
    while True:
        actions = dispatcher.on_replica_lost(starts.pop().replica_id, Loss.CRASH, "signal 11", now_s)
        num_deaths += 1
        if fails := of(Fail, actions):
            break
        now_s += 10.0
        starts += of(StartReplica, actions + dispatcher.on_tick(now_s))
    assert num_deaths == 4
    assert "no replica could be started: its process died: signal 11" in str(fails[0].error)


def test_a_replica_without_finite_logits_is_replaced_once_then_the_rows_are_trusted():
    dispatcher, [lease] = started(num_units=1, num_replicas=1)
    assert not lease.trusts_nan
    [start] = of(StartReplica, dispatcher.on_replica_lost(0, Loss.SUSPECT, "all NaN", 1.0))
    dispatcher.on_unit_checked(0, None)
    [again] = dispatcher.on_replica_ready(start.replica_id, 2.0)
    assert (again.trusts_nan, again.caution) == (True, None)


# --- a number of replicas that follows the cluster -----------------------------------------------


def test_nothing_is_leased_before_as_many_are_ready_as_it_begins_with():
    dispatcher = make(num_units=10, num_replicas=4, min_replicas=3, max_leases=1)
    assert len(dispatcher.start(0.0)) == 4
    assert dispatcher.on_replica_ready(0, 1.0) == dispatcher.on_replica_ready(2, 2.0) == []
    assert {lease.replica_id for lease in of(Lease, dispatcher.on_replica_ready(1, 3.0))} == {0, 1, 2}
    assert len(of(Lease, dispatcher.on_replica_ready(3, 4.0))) == 1


def test_once_begun_it_goes_on_with_fewer_than_it_begins_with():
    dispatcher, leases = started(num_units=6, num_replicas=2, min_replicas=2, max_leases=1)
    dispatcher.on_replica_lost(1, Loss.NODE, "gone", 1.0)
    dispatcher.on_unit_checked(leases[0].unit_index, None)
    assert len(of(Lease, dispatcher.on_report(*done(leases[1])))) == 1
    assert dispatcher.on_tick(1000.0) == []  # one works: there is no time limit


def test_with_few_units_fewer_replicas_are_waited_for():
    dispatcher = make(num_units=1, num_replicas=4, min_replicas=3)
    dispatcher.start(0.0)
    assert len(dispatcher.on_replica_ready(0, 1.0)) == 1


def test_too_few_replicas_in_time_are_told_with_why_the_last_one_failed():
    dispatcher = make(num_replicas=4, min_replicas=3, start_timeout_s=60.0)
    dispatcher.start(0.0)
    dispatcher.on_replica_ready(0, 1.0)
    dispatcher.on_replica_failed_to_start(1, ("ModelError", "no weights here", ""), 2.0)
    [failure] = [fail for now_s in range(5, 65, 5) for fail in of(Fail, dispatcher.on_tick(now_s))]
    assert str(failure.error).startswith("1 of the 3 replicas needed were ready within 60 s")
    assert "no weights here" in str(failure.error)


def test_it_grows_when_nodes_join_and_the_new_ones_are_fed():
    dispatcher, _ = started(num_units=20, num_replicas=1, max_leases=2)
    starts = dispatcher.on_target(3)
    assert starts == [StartReplica(1), StartReplica(2)]
    assert len(of(Lease, dispatcher.on_replica_ready(1, 1.0))) == 2


def test_it_grows_only_as_far_as_there_are_units():
    dispatcher, _ = started(num_units=2, num_replicas=1, max_leases=1)
    assert dispatcher.on_target(9) == [StartReplica(1)]


def test_when_nodes_leave_only_who_waits_for_one_is_taken_back():
    dispatcher = make(num_units=10, num_replicas=4)
    dispatcher.start(0.0)
    dispatcher.on_replica_ready(0, 1.0)
    dispatcher.on_heartbeat(1, 0, 1.0)  # it has a process, and loads
    assert [kill.replica_id for kill in dispatcher.on_target(1)] == [3, 2]
    assert (dispatcher.num_ready, dispatcher.num_starting) == (1, 1)
    assert dispatcher.on_replica_lost(1, Loss.NODE, "gone", 2.0) == []


def test_when_nodes_leave_those_left_begin_without_the_ones_waited_for():
    dispatcher = make(num_units=10, num_replicas=2, min_replicas=2, max_leases=1)
    dispatcher.start(0.0)
    assert dispatcher.on_replica_ready(0, 1.0) == []
    assert [lease.replica_id for lease in of(Lease, dispatcher.on_target(1))] == [0]


def test_a_driver_that_slept_waits_for_its_first_replicas_as_long_as_others():
    dispatcher = make(num_units=10, num_replicas=1, start_timeout_s=60.0)
    dispatcher.start(0.0)
    dispatcher.on_replica_loading(0, 0.0)
    assert of(Fail, dispatcher.on_tick(1000.0)) == []
    assert of(Lease, dispatcher.on_replica_ready(0, 1001.0)) != []


def test_more_replicas_may_die_and_be_silent_for_longer_once_it_has_grown():
    dispatcher, _ = started(num_units=4000, num_replicas=1)
    dispatcher.on_target(500)
    dispatcher.on_target(1)
    assert of(KillReplica, dispatcher.on_tick(9.0)) == []
    for now_s in range(10, 150, 10):
        dispatcher.on_tick(float(now_s))
    assert dispatcher.num_ready == 1, "its last poll may have been told to wait for 100 s"


def test_a_replica_that_loads_too_long_is_replaced_while_others_work():
    dispatcher = make(num_units=10, num_replicas=2, start_timeout_s=60.0)
    dispatcher.start(0.0)
    dispatcher.on_replica_ready(0, 1.0)
    dispatcher.on_replica_loading(1, 30.0)
    dispatcher.on_replica_loading(1, 80.0)
    assert ticks(dispatcher, 10, 89) == []
    [kill] = of(KillReplica, dispatcher.on_tick(90.0))
    assert (kill.replica_id, "not loaded within 60 s" in kill.reason) == (1, True)
    assert ticks(dispatcher, 91, 95) == [StartReplica(2)]


def test_a_replica_that_waits_for_a_node_or_its_turn_may_wait():
    dispatcher = make(num_units=10, num_replicas=3, start_timeout_s=60.0)
    dispatcher.start(0.0)
    dispatcher.on_replica_ready(0, 1.0)
    dispatcher.on_heartbeat(1, 0, 1.0)
    assert ticks(dispatcher, 2, 500) == []


def test_replicas_that_never_load_are_given_up_in_the_end():
    dispatcher = make(num_units=10, num_replicas=2, start_timeout_s=10.0)
    dispatcher.start(0.0)
    dispatcher.on_replica_ready(0, 0.0)
    kills, starting = [], 1
    for now_s in range(1, 600):
        dispatcher.on_heartbeat(0, now_s, float(now_s))
        dispatcher.on_replica_loading(starting, float(now_s))
        actions = dispatcher.on_tick(float(now_s))
        kills += of(KillReplica, actions)
        starting = next((start.replica_id for start in of(StartReplica, actions)), starting)
    assert 3 <= len(kills) <= 8
    assert [kill.reason.endswith("no other is tried") for kill in kills] == [False] * (len(kills) - 1) + [
        True
    ]


def ticks(dispatcher, first_s, last_s):
    """What a second's ticks lead to while replica 0 works."""
    actions = []
    for now_s in range(first_s, last_s + 1):
        dispatcher.on_heartbeat(0, now_s, float(now_s))
        actions += dispatcher.on_tick(float(now_s))
    return actions
