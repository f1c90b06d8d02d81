"""The dispatcher in a simulated world: a store that creates exclusively and is full at times, replicas that
crash, hang, lose their numbers, wake as zombies, fail, answer twice or not at all, rows that take them down,
a driver that sleeps or is asked to stop."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from b2batch.errors import ClusterError, StorageError, UnitFailed
from b2batch.rows import PieceBegun, UnitCounts, UnitReport

MAX_LEASES = 3
HANG_S = 30.0
LONGEST_PAUSE_S = 20.0  # after a store that takes nothing
FEW_NAN_LOSSES = 3
ROWS = 40  # of a unit: more than are run one by one at first


@dataclass
class SimReplica:
    avoided: frozenset[str]
    is_ready: bool = False
    is_frozen: bool = False
    num_steps: int = 0
    leases: list[Lease] = field(default_factory=list)
    num_begun: dict[int, int] = field(default_factory=dict)  # unit -> pieces of it that were announced
    outbox: list[UnitReport | PieceBegun] = field(default_factory=list)


class DispatchWorld(RuleBasedStateMachine):
    @initialize(
        num_units=st.integers(1, 25),
        num_replicas=st.integers(1, 4),
        min_replicas=st.integers(1, 3),
        start_timeout_s=st.sampled_from([1e9, 40.0]),
        poison=st.sets(st.tuples(st.integers(0, 24), st.integers(0, ROWS - 1)), max_size=3),
    )
    def begin(self, num_units, num_replicas, min_replicas, start_timeout_s, poison):
        self.num_units = num_units
        self.target = num_replicas
        self.min_replicas = min_replicas
        self.has_begun = self.is_draining = False
        self.works_since_s = 0.0  # the store took everything since
        self.num_nan_losses = 0
        self.nan_units: set[int] = set()
        self.failed_on: dict[int, int] = {}  # unit -> the replica that it last failed on or went down with
        self.deadly_nodes: set[str] = set()
        self.nodes: dict[int, str] = {}  # replica -> where it is
        self.poison = {unit: {row for other, row in poison if other == unit} for unit in range(num_units)}
        self.now_s = 0.0
        self.store: dict[int, int] = {}  # unit -> how often its part was created
        self.replicas: dict[int, SimReplica] = {}
        self.zombies: list[Lease] = []  # leases of written-off replicas that may still commit
        self.old_reports: list[tuple[int, UnitReport]] = []
        self.checks: list[int] = []
        self.ended: Finish | Fail | None = None
        policy = DispatchPolicy(
            num_replicas=num_replicas,
            start_timeout_s=start_timeout_s,
            max_leases=MAX_LEASES,
            step_timeout_s=HANG_S,
            min_replicas=min_replicas,
        )
        self.dispatcher = Dispatcher(range(num_units), policy, num_rows=lambda unit: ROWS)
        self.apply(self.dispatcher.start(0.0))

    # --- the world -------------------------------------------------------------------------------

    def apply(self, actions):
        for action in actions:
            assert self.ended is None, "no action after the end"
            match action:
                case StartReplica(replica_id, avoided):
                    assert replica_id not in self.replicas
                    assert not self.is_draining
                    assert avoided <= self.deadly_nodes
                    self.replicas[replica_id] = SimReplica(avoided)
                    assert len(self.replicas) <= min(self.target, self.num_units)
                case KillReplica(replica_id):  # as those that hang
                    self.note_death(replica_id)
                    self.bury(replica_id)
                case CheckCommitted(unit):
                    self.checks.append(unit)
                case Lease():
                    self.accept(action)
                case Cancel(replica_id, unit):
                    replica = self.replicas[replica_id]
                    self.zombies += [lease for lease in replica.leases if lease.unit_index == unit]
                    replica.leases = [lease for lease in replica.leases if lease.unit_index != unit]
                case Finish() | Fail():
                    self.ended = action

    def accept(self, lease):
        replica = self.replicas[lease.replica_id]
        assert replica.is_ready
        assert not self.is_draining
        assert self.num_ready >= self.num_needed
        self.has_begun = True
        if self.num_nan_losses >= FEW_NAN_LOSSES or lease.unit_index in self.nan_units:
            assert lease.trusts_nan, "no numbers once are the replica's fault, and then the rows'"
        assert self.num_nan_losses or not lease.trusts_nan
        assert lease.unit_index not in {other.unit_index for other in replica.leases}
        replica.leases.append(lease)

    @property
    def num_ready(self):
        return sum(replica.is_ready for replica in self.replicas.values())

    @property
    def num_needed(self):
        """Once it has begun, it goes on with any."""
        num_open = self.num_units - self.dispatcher.units.num_committed
        return 1 if self.has_begun else min(self.min_replicas, self.target, num_open)

    def bury(self, replica_id):
        replica = self.replicas.pop(replica_id)
        self.zombies += replica.leases
        self.old_reports += [(replica_id, report) for report in replica.outbox]

    def commit(self, lease):
        """Exclusive creation: the second writer finds the part there."""
        is_new = lease.unit_index not in self.store
        self.store.setdefault(lease.unit_index, 1)
        return UnitReport(lease.unit_index, lease.attempt, UnitCounts(num_ok=1), is_new)

    def pick(self, data, wanted):
        ids = sorted(key for key, replica in self.replicas.items() if wanted(replica))
        return data.draw(st.sampled_from(ids)) if ids and self.ended is None else None

    def deliver(self, replica_id):
        replica = self.replicas[replica_id]
        reports, replica.outbox = replica.outbox, []
        self.dispatcher.on_heartbeat(replica_id, replica.num_steps, self.now_s)
        for report in reports:
            self.old_reports.append((replica_id, report))
            if self.ended is None:
                self.tell(replica_id, report)

    def tell(self, replica_id, report):
        if isinstance(report, PieceBegun):
            self.dispatcher.on_piece_begun(replica_id, report)
        else:
            if report.error:
                self.failed_on[report.unit_index] = replica_id
                if report.error[0] == "StorageError":
                    self.works_since_s = self.now_s + LONGEST_PAUSE_S
            self.apply(self.dispatcher.on_report(replica_id, report))

    def is_deadly(self, lease):
        """Whether the replica dies of what it computes next of this lease."""
        poison = self.poison[lease.unit_index]
        if lease.caution is None:
            return bool(poison)
        number = self.replicas[lease.replica_id].num_begun.get(lease.unit_index, 0) - 1
        return number >= 0 and bool(poison & set(lease.caution.pieces[number]))

    def note_death(self, replica_id):
        self.failed_on |= {lease.unit_index: replica_id for lease in self.replicas[replica_id].leases}
        self.deadly_nodes.add(self.nodes.get(replica_id))

    def die(self, replica_id, loss):
        if loss is Loss.SUSPECT:
            self.num_nan_losses += 1
            self.nan_units |= {lease.unit_index for lease in self.replicas[replica_id].leases}
        self.note_death(replica_id)
        self.bury(replica_id)
        self.apply(self.dispatcher.on_replica_lost(replica_id, loss, "gone", self.now_s))

    def begin_piece(self, lease):
        """Announce the next piece of a lease under caution; False when all are begun."""
        replica = self.replicas[lease.replica_id]
        number = replica.num_begun.get(lease.unit_index, 0)
        if lease.caution is None or number == len(lease.caution.pieces):
            return False
        replica.num_begun[lease.unit_index] = number + 1
        begun = PieceBegun(lease.unit_index, lease.attempt, number)
        self.old_reports.append((lease.replica_id, begun))
        self.tell(lease.replica_id, begun)  # a replica goes on only once it is known
        return True

    # --- what may happen -------------------------------------------------------------------------

    @rule(data=st.data(), node=st.sampled_from("abc"))
    def becomes_ready(self, data, node):
        replica_id = self.pick(data, lambda replica: not replica.is_ready and node not in replica.avoided)
        if replica_id is not None:
            self.be_ready(replica_id, node)

    def be_ready(self, replica_id, node):
        self.nodes[replica_id] = node
        self.replicas[replica_id].is_ready = True
        self.apply(self.dispatcher.on_replica_ready(replica_id, self.now_s, node))

    @rule(data=st.data())
    def begins_to_load(self, data):
        replica_id = self.pick(data, lambda replica: not replica.is_ready)
        if replica_id is not None:
            self.dispatcher.on_heartbeat(replica_id, 0, self.now_s)
            self.dispatcher.on_replica_loading(replica_id, self.now_s)

    @rule(num_replicas=st.integers(1, 6))
    def nodes_join_or_leave(self, num_replicas):
        if self.ended is None:
            self.target = num_replicas
            self.apply(self.dispatcher.on_target(num_replicas))

    @rule(data=st.data())
    def commits_a_unit(self, data):
        replica_id = self.pick(data, lambda replica: replica.leases and not replica.is_frozen)
        if replica_id is not None:
            replica = self.replicas[replica_id]
            replica.num_steps += 1
            self.compute(replica, data.draw(st.sampled_from(replica.leases)))

    def compute(self, replica, lease):
        """A lease's next piece, or all of it."""
        if self.is_deadly(lease):
            self.die(lease.replica_id, Loss.CRASH)
        elif not self.begin_piece(lease):
            replica.leases.remove(lease)
            replica.outbox.append(self.commit(lease))

    @rule(data=st.data(), code=st.sampled_from(["OSError", "OSError", "StorageError"]))
    def fails_a_unit(self, data, code):
        replica_id = self.pick(data, lambda replica: replica.leases and not replica.is_frozen)
        if replica_id is not None:
            replica = self.replicas[replica_id]
            lease = replica.leases.pop(0)
            error = (code, "the store said 503", "")
            replica.outbox.append(UnitReport(lease.unit_index, lease.attempt, error=error))

    @rule(data=st.data())
    def answers(self, data):
        replica_id = self.pick(data, lambda replica: not replica.is_frozen)
        if replica_id is not None:
            self.deliver(replica_id)

    @rule(data=st.data(), loss=st.sampled_from(Loss))
    def is_lost_with_its_reports(self, data, loss):
        replica_id = self.pick(data, lambda replica: True)
        if replica_id is not None:
            self.die(replica_id, loss)

    @rule(data=st.data())
    def freezes(self, data):
        replica_id = self.pick(data, lambda replica: replica.leases)
        if replica_id is not None:
            self.replicas[replica_id].is_frozen = True

    @rule(data=st.data())
    def fails_to_start(self, data):
        replica_id = self.pick(data, lambda replica: not replica.is_ready)
        if replica_id is not None:
            error = ("RuntimeError", "bad device", "")
            self.apply(self.dispatcher.on_replica_failed_to_start(replica_id, error, self.now_s))

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def a_zombie_commits_and_its_report_arrives(self, data):
        lease = self.zombies.pop(data.draw(st.integers(0, len(self.zombies) - 1)))
        if self.poison[lease.unit_index] and lease.caution is None:
            return  # it died of it
        report = self.commit(lease)
        if data.draw(st.booleans()):
            self.apply(self.dispatcher.on_report(lease.replica_id, report))

    @precondition(lambda self: self.old_reports)
    @rule(data=st.data())
    def a_report_arrives_twice(self, data):
        replica_id, report = data.draw(st.sampled_from(self.old_reports))
        self.tell(replica_id, report)

    @precondition(lambda self: self.checks)
    @rule(data=st.data())
    def the_store_answers(self, data):
        unit = self.checks.pop(data.draw(st.integers(0, len(self.checks) - 1)))
        counts = UnitCounts(num_ok=1) if unit in self.store else None
        self.apply(self.dispatcher.on_unit_checked(unit, counts))

    @precondition(lambda self: self.ended is None and not self.is_draining)
    @rule(is_asked=st.integers(0, 7))
    def is_asked_to_stop(self, is_asked):
        if not is_asked:
            self.is_draining = True
            self.apply(self.dispatcher.on_stop())

    @rule()
    def the_driver_sleeps(self):
        """Nobody is to blame for the time of which it knows nothing."""
        self.now_s += 1000.0
        actions = self.dispatcher.on_tick(self.now_s)
        assert not [action for action in actions if isinstance(action, KillReplica | Fail)]
        self.apply(actions)

    @rule(seconds=st.sampled_from([0.5, 2.0, 8.0]))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.apply(self.dispatcher.on_tick(self.now_s))

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def a_replica_holds_at_most_max_leases(self):
        assert all(len(replica.leases) <= MAX_LEASES for replica in self.replicas.values())

    @invariant()
    def nobody_is_idle_while_a_unit_waits(self):
        """But for who it has failed on, where there are others."""
        if self.ended or self.is_draining or self.now_s < self.works_since_s:
            return
        if self.num_ready < self.num_needed or not self.dispatcher.units.has_queued:
            return
        failed_on = set(self.failed_on.values()) if self.num_ready > 1 else set()
        for replica_id in self.replicas.keys() - failed_on:
            replica = self.replicas[replica_id]
            assert not replica.is_ready or replica.leases or replica.outbox

    @invariant()
    def nothing_counts_twice_or_uncommitted(self):
        assert self.dispatcher.units.counts.num_ok == self.dispatcher.units.num_committed <= len(self.store)

    @invariant()
    def finished_means_all_committed(self):
        if isinstance(self.ended, Finish):
            assert self.store.keys() == set(range(self.num_units))

    def teardown(self):
        """From any state, a calm world finishes in a bounded number of rounds, or a budget was spent."""
        if not hasattr(self, "dispatcher"):
            return
        for replica in self.replicas.values():
            replica.outbox.clear()  # replies lost while the replica lives on
        for _ in range(self.num_units * 3 + 400):
            if self.ended is None:
                self.calm_round()
        if self.is_draining and self.ended is None:
            assert not self.dispatcher.num_leased, "what was begun comes to an end"
            return
        assert self.ended is not None, "no progress in a calm world"
        if isinstance(self.ended, Finish):
            assert self.dispatcher.units.num_committed == self.num_units == len(self.store)
        else:
            assert isinstance(self.ended.error, ClusterError | UnitFailed | StorageError)

    def calm_round(self):
        while self.checks and self.ended is None:
            unit = self.checks.pop()
            counts = UnitCounts(num_ok=1) if unit in self.store else None
            self.apply(self.dispatcher.on_unit_checked(unit, counts))
        for replica_id, replica in list(self.replicas.items()):
            if self.ended is None and not replica.is_frozen and replica_id in self.replicas:
                self.calm_turn(replica_id, replica)
        if self.ended is None:
            self.now_s += 5.0
            self.apply(self.dispatcher.on_tick(self.now_s))

    def calm_turn(self, replica_id, replica):
        if not replica.is_ready:
            self.be_ready(replica_id, min({"a", "b", "c", "d"} - replica.avoided))
        replica.num_steps += bool(replica.leases)
        for lease in list(replica.leases):
            while replica_id in self.replicas and lease in replica.leases and self.ended is None:
                self.compute(replica, lease)
        if replica_id in self.replicas:
            self.deliver(replica_id)


DispatchWorld.TestCase.settings = settings(max_examples=400, stateful_step_count=60)
TestDispatchWorld = DispatchWorld.TestCase
