from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from b2batch.cluster.pending import PendingUnits


@given(st.sets(st.integers(0, 200)), st.lists(st.tuples(st.integers(0, 4), st.booleans())))
def test_every_unit_is_handed_out_once_whoever_asks_and_leaves(unit_indexes, calls):
    pending = PendingUnits(sorted(unit_indexes))
    taken = []
    for replica_id, leaves in calls:
        if leaves:
            pending.give_up(replica_id)
        else:
            taken.append(pending.take(replica_id))
        assert len(pending) == sum(map(len, pending.spans()))
    while len(pending):
        taken.append(pending.take(0))
    assert sorted(unit for unit in taken if unit is not None) == sorted(unit_indexes)
    assert pending.take(1) is None


def test_a_replica_reads_forward_and_shares_are_even():
    pending = PendingUnits(range(1000))
    taken = {replica_id: [] for replica_id in range(4)}
    while len(pending):
        for replica_id, units in taken.items():
            unit = pending.take(replica_id)
            if unit is not None:
                units.append(unit)
    assert [len(units) for units in taken.values()] == [250] * 4
    jumps = sum(b != a + 1 for units in taken.values() for a, b in pairwise(units))
    assert jumps < 40


def test_a_lost_replicas_rest_goes_to_others():
    pending = PendingUnits(range(10))
    assert pending.take(0) == 0
    pending.give_up(0)
    assert [pending.take(1) for _ in range(9)] == list(range(1, 10))
