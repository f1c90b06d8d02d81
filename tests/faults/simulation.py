"""Everything between the plan and ``_SUCCESS`` on one clock and in one process, driven by one random source.

The dispatcher, the run directory, the lease, the commit and finalise are the real ones. Around them stand
processes that can end between any two writes, a store that loses and doubles replies, replicas that go on
after they were written off, and drivers that stop beyond their lease and wake again. What must hold is
checked after every event, as a reader of the directory would see it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from outputs.memory_store import MemoryStore
from outputs.tiny_run import (
    INPUT_SCHEMA,
    PLAN,
    answer,
    failed,
    make_part,
    make_record,
    make_spec,
    make_units,
)

from b2batch.cluster.actions import (
    Action,
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
from b2batch.errors import Fenced, RunLocked
from b2batch.outputs import finalise, parts
from b2batch.outputs.document import read_document
from b2batch.outputs.lease import LEASE_TTL_S, Epoch
from b2batch.outputs.parts import Part, planned_row_ids
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import prove_exclusive_creation
from b2batch.rows import PieceBegun, UnitReport

SPEC = make_spec()
UNITS = make_units(6, 2)
RECORD = make_record(SPEC, UNITS)
SCHEMA = output_schema(INPUT_SCHEMA, SPEC)
ROW_IDS = [row_id for unit in UNITS for row_id in planned_row_ids(unit)]
NUM_REPLICAS = 2
MAX_LEASES = 2
HANG_S = 30.0
MAX_CALM_ROUNDS = 300


class Died(BaseException):
    """The process that did this is gone; nothing may catch it."""


class ReplyLost(OSError):
    """The store did it, or not: whoever asked does not know."""


class Violation(AssertionError):
    """The promise is broken."""


def require(holds: bool, what: str) -> None:
    """``what`` must hold; an assertion that pytest does not rewrite."""
    if not holds:
        raise Violation(what)


@functools.cache
def part_of(unit_index: int, attempt: int, epoch: int, condemned: frozenset[int] = frozenset()) -> Part:
    unit = UNITS[unit_index]
    row_ids = planned_row_ids(unit)
    results = [failed(row) if offset in condemned else answer(row) for offset, row in enumerate(row_ids)]
    return make_part(unit, RECORD.run_id, spec=SPEC, results=results, attempt=attempt, epoch=epoch)


class ProcessStore:
    """What one process sees of the store. ``dies_at``: how many writes it survives; -1: all.

    The write at which it dies happens or not, as ``is_late`` says. ``lose`` and ``double`` make the next
    exclusive creation lose its reply, or reach the store twice.
    """

    uri = MemoryStore.uri

    def __init__(self, store: MemoryStore, dies_at: int = -1, is_late: bool = False) -> None:
        self.store, self.dies_at, self.is_late = store, dies_at, is_late
        self.is_dead = False
        self.lose = self.double = False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        def create() -> bool:
            created = self.store.put_if_absent(key, data)
            return self.store.put_if_absent(key, data) if self.double else created

        created = self._write(create)
        self.double = False
        if self.lose:
            self.lose = False
            raise ReplyLost(key)
        return created

    def put(self, key: str, data: bytes) -> None:
        self._write(lambda: self.store.put(key, data))

    def delete(self, key: str) -> None:
        self._write(lambda: self.store.delete(key))

    def delete_tree(self, key: str) -> None:
        self._write(lambda: self.store.delete_tree(key))

    def read(self, key: str) -> bytes:
        self._live()
        return self.store.read(key)

    def open(self, key: str) -> BinaryIO:
        self._live()
        return self.store.open(key)

    def exists(self, key: str) -> bool:
        self._live()
        return self.store.exists(key)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        self._live()
        return self.store.list(prefix)

    def age_s(self, key: str) -> float:
        self._live()
        return self.store.age_s(key)

    def probe(self) -> None:
        prove_exclusive_creation(self)

    def _live(self) -> None:
        if self.is_dead:
            raise Died

    def _write(self, act: Callable[[], Any]) -> Any:
        self._live()
        if self.dies_at == 0:
            self.is_dead = True
            if self.is_late:
                act()
            raise Died
        self.dies_at -= 1
        return act()


@dataclass
class SimReplica:
    """A replica process: what it was leased, what it has generated, what it has to say."""

    store: ProcessStore
    epoch: int
    is_ready: bool = False
    is_frozen: bool = False
    num_steps: int = 0
    num_begun: int = 0  # pieces of the unit under caution
    is_waiting: bool = False  # until the driver knows which piece comes next
    inbox: list[Lease] = field(default_factory=list)
    staged: list[Part] = field(default_factory=list)
    outbox: list[UnitReport | PieceBegun] = field(default_factory=list)

    @property
    def num_in_flight(self) -> int:
        return len(self.inbox) + len(self.staged)

    @property
    def row_alone(self) -> tuple[int, int] | None:
        """The row that runs alone now: its unit and its offset."""
        if not self.inbox or self.inbox[0].caution is None or not self.num_begun or self.is_waiting:
            return None
        piece = self.inbox[0].caution.pieces[self.num_begun - 1]
        return (self.inbox[0].unit_index, piece[0]) if len(piece) == 1 else None

    def drop(self, unit_index: int) -> None:
        if self.inbox and self.inbox[0].unit_index == unit_index:
            self.num_begun, self.is_waiting = 0, False
        self.inbox = [lease for lease in self.inbox if lease.unit_index != unit_index]
        self.staged = [part for part in self.staged if part.unit.index != unit_index]

    def units(self) -> set[int]:
        return {item.unit_index for item in (*self.inbox, *self.outbox)} | {p.unit.index for p in self.staged}


class SimDriver:
    """One start of the driver, from opening the directory to ``_SUCCESS`` or its end."""

    def __init__(self, world: World, store: ProcessStore) -> None:
        self.world, self.store = world, store
        self.replicas: dict[int, SimReplica] = {}
        self.checks: list[int] = []
        self.done_units: set[int] = set()
        self.is_frozen = self.is_over = False
        self.has_all = False
        self.last_beat_s = world.now_s
        self.directory = RunDirectory.open(store, RECORD, PLAN)
        if self.directory.success() is not None:
            self.is_over = True
            world.note_success()
            return
        taken = self.directory.take_epoch()
        self.epoch = Epoch(store, RECORD.run8, taken.number, lambda: world.now_s)
        world.note_new_holder()
        self.done_units = set(self.directory.committed_units(UNITS))
        policy = DispatchPolicy(
            num_replicas=NUM_REPLICAS,
            start_timeout_s=1e9,
            max_leases=MAX_LEASES,
            step_timeout_s=HANG_S,
        )
        todo = [unit.index for unit in UNITS if unit.index not in self.done_units]
        self.dispatcher = Dispatcher(todo, policy, num_rows=lambda index: UNITS[index].num_rows)
        self.apply(self.dispatcher.start(world.now_s))

    # --- decisions -------------------------------------------------------------------------------

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartReplica(replica_id):
                    self.replicas[replica_id] = SimReplica(self.world.new_process(), self.epoch.number)
                case KillReplica(replica_id):
                    self.bury(replica_id)
                case CheckCommitted(unit_index):
                    self.checks.append(unit_index)
                case Lease():
                    self.accept(action)
                case Cancel(replica_id, unit_index):
                    self.replicas[replica_id].drop(unit_index)
                case Finish():
                    self.has_all = True
                case Fail():
                    self.leave()

    def accept(self, lease: Lease) -> None:
        require(lease.unit_index not in self.done_units, "I6: a committed unit is leased again")
        is_copy = any(lease.unit_index in replica.units() for replica in self.replicas.values())
        self.world.num_excused += is_copy  # of a straggler, at the end
        self.replicas[lease.replica_id].inbox.append(lease)

    def bury(self, replica_id: int) -> None:
        """Written off: what it has generated may still reach the store."""
        replica = self.replicas.pop(replica_id)
        require(replica.num_in_flight <= MAX_LEASES, "I15: more was in flight than leases allow")
        self.world.write_off(replica)

    def leave(self) -> None:
        """The process ends by itself; its replicas with it."""
        self.is_over = True
        for replica_id in list(self.replicas):
            self.bury(replica_id)
        self.epoch.close()

    def die(self) -> None:
        """kill -9, or a crash on the way."""
        self.is_over = self.store.is_dead = True
        for replica_id in list(self.replicas):
            self.bury(replica_id)

    # --- turns -----------------------------------------------------------------------------------

    def beat(self) -> None:
        self.epoch.beat()

    def note_beat(self) -> None:
        """When the lease was renewed, by the store's own account."""
        if not self.is_over:
            heartbeat = self.directory.keys.heartbeat
            if read_document(self.world.store, heartbeat)["epoch"] == self.epoch.number:
                self.last_beat_s = self.world.store.written_s[heartbeat]

    def tick(self) -> None:
        self.apply(self.dispatcher.on_tick(self.world.now_s))

    def hear(self, replica_id: int) -> None:
        """A poll's answer: readiness and reports."""
        replica = self.replicas[replica_id]
        self.dispatcher.on_heartbeat(replica_id, replica.num_steps, self.world.now_s)
        if replica.is_ready:
            self.apply(self.dispatcher.on_replica_ready(replica_id, self.world.now_s))
        reports, replica.outbox = replica.outbox, []
        replica.is_waiting = False
        for report in reports:
            self.take(replica_id, report)

    def take(self, replica_id: int, report: UnitReport | PieceBegun) -> None:
        if isinstance(report, PieceBegun):
            self.dispatcher.on_piece_begun(replica_id, report)
            return
        if report.error is None:
            self.done_units.add(report.unit_index)
        self.apply(self.dispatcher.on_report(replica_id, report))

    def lose(self, replica_id: int, loss: Loss) -> None:
        self.bury(replica_id)
        self.apply(self.dispatcher.on_replica_lost(replica_id, loss, "gone", self.world.now_s))

    def look_up(self) -> None:
        """One answer of the store about a unit whose replica is gone."""
        unit_index = self.checks.pop(0)
        report = self.directory.find_part(UNITS[unit_index])
        if report is not None:
            self.done_units.add(unit_index)
        self.apply(self.dispatcher.on_unit_checked(unit_index, report and report.counts))

    def finalise(self) -> None:
        self.epoch.check_not_fenced()
        finalise.finalise(self.directory, UNITS, SCHEMA, num_skipped_blank=0, max_error_rate=1.0)
        self.world.note_success()
        self.leave()


class World:
    """The store, the clock and every process; ``random`` decides what happens next.

    ``poison`` are rows, as (unit, offset), that end the process that generates them.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self.store = MemoryStore()
        self.drivers: list[SimDriver] = []
        self.strays: list[SimReplica] = []
        self.visible: dict[str, bytes] = {}
        self.row_ids: set[str] = set()
        self.failed_ids: set[str] = set()
        self.poison = self.choose_poison()
        self.bad_luck: Counter[tuple[int, int]] = Counter()  # deaths of others' making while a row ran alone
        self.num_generated: Counter[int] = Counter()
        self.num_excused = 0
        self.num_successes = 0
        self.num_events: Counter[str] = Counter()

    @property
    def now_s(self) -> float:
        return self.store.now_s

    def choose_poison(self) -> frozenset[tuple[int, int]]:
        num_rows = self.random.choice([0, 0, 1, 2])
        return frozenset(
            (self.random.randrange(len(UNITS)), self.random.randrange(2)) for _ in range(num_rows)
        )

    # --- what drivers tell -----------------------------------------------------------------------

    def new_process(self) -> ProcessStore:
        """The store as a new process sees it; one in eight is to die at one of its writes."""
        dies_at = self.random.randrange(24) if self.random.randrange(8) == 0 else -1
        return ProcessStore(self.store, dies_at, bool(self.random.randrange(2)))

    def write_off(self, replica: SimReplica) -> None:
        alone = replica.row_alone
        if alone is not None and alone not in self.poison:
            self.bad_luck[alone] += 1
        self.num_excused += replica.num_in_flight
        if not replica.store.is_dead:
            self.strays.append(replica)

    def note_new_holder(self) -> None:
        """I13: a lease that is alive is not taken."""
        for other in self.drivers:
            if not other.is_over:
                silent_s = self.now_s - other.last_beat_s
                require(silent_s > LEASE_TTL_S, f"I13: a lease beaten {silent_s:.0f} s ago was taken")
                self.num_excused += sum(len(replica.staged) for replica in other.replicas.values())

    def note_success(self) -> None:
        self.num_successes += 1
        require(self.row_ids_now() == sorted(ROW_IDS), "I1: a finished run, and its rows are not the input's")

    # --- events ----------------------------------------------------------------------------------

    def run(self, num_events: int) -> None:
        """Some random events, then calm weather until a run is finished; checked all the way."""
        for _ in range(num_events):
            self.happen()
        for _ in range(MAX_CALM_ROUNDS):
            if self.num_successes and not self.live_drivers() and not self.strays:
                break
            self.calm_round()
        else:
            raise Violation("I16: no end in a calm world")
        self.prove_end()

    def live_drivers(self) -> list[SimDriver]:
        return [driver for driver in self.drivers if not driver.is_over]

    def happen(self) -> None:
        events: list[Callable[[], None]] = [self.time_passes, self.start_a_driver]
        events += [self.a_stray_goes_on] * (2 * bool(self.strays))
        for driver in self.live_drivers():
            events += [functools.partial(self.disturb, driver)]
            if not driver.is_frozen:
                events += [functools.partial(self.turn, driver)] * 6
            for replica in driver.replicas.values():
                events += [functools.partial(self.work, replica)] * 3
        self.random.choice(events)()
        self.look()

    def time_passes(self) -> None:
        self.store.now_s += self.random.choice([1.0, 12.0, HANG_S, LEASE_TTL_S + 1])

    def start_a_driver(self) -> None:
        if len(self.live_drivers()) >= 3:
            return
        try:
            self.drivers.append(SimDriver(self, self.new_process()))
        except RunLocked:
            self.num_events["locked out"] += 1
        except Died:
            self.num_events["driver died at start"] += 1

    def disturb(self, driver: SimDriver) -> None:
        match self.random.randrange(6):
            case 0:
                driver.die()
                self.num_events["driver killed"] += 1
            case 1:
                driver.is_frozen = not driver.is_frozen
                self.num_events["driver stopped or continued"] += 1
            case 2 | 3 if driver.replicas:
                replica = driver.replicas[self.pick(driver.replicas)]
                replica.is_frozen = not replica.is_frozen
                self.num_events["replica stopped or continued"] += 1
            case 4 if driver.replicas and not driver.is_frozen:
                replica_id = self.pick(driver.replicas)
                driver.replicas[replica_id].store.is_dead = bool(self.random.randrange(2))
                self.guard(driver, lambda: driver.lose(replica_id, self.random.choice(list(Loss))))
                self.num_events["replica lost"] += 1
            case 5 if driver.replicas:
                store = driver.replicas[self.pick(driver.replicas)].store
                store.lose, store.double = [(True, False), (False, True)][self.random.randrange(2)]
                self.num_events["reply lost or doubled"] += 1

    def turn(self, driver: SimDriver) -> None:
        """One thing that the driver's loop does."""
        acts: list[Callable[[], None]] = [driver.beat, driver.tick]
        acts += [functools.partial(driver.hear, replica_id) for replica_id in self.reachable(driver)]
        acts += [driver.look_up] * bool(driver.checks)
        self.guard(driver, driver.finalise if driver.has_all else self.random.choice(acts))

    def reachable(self, driver: SimDriver) -> list[int]:
        for replica_id in [key for key, replica in driver.replicas.items() if replica.store.is_dead]:
            self.guard(driver, functools.partial(driver.lose, replica_id, Loss.CRASH))
        return [key for key, replica in driver.replicas.items() if not replica.is_frozen]

    def guard(self, driver: SimDriver, act: Callable[[], None]) -> None:
        """What the driver does, and how its process ends if that ends it."""
        try:
            if not driver.is_over:
                act()
                driver.note_beat()
        except Died:
            driver.die()
            self.num_events["driver died at a write"] += 1
        except Fenced:
            self.num_events["fenced"] += 1
            driver.leave()

    def work(self, replica: SimReplica) -> None:
        """One step of a replica: get ready, generate, or commit."""
        if replica.is_frozen or replica.store.is_dead:
            return
        replica.is_ready = True
        if replica.staged and (not replica.inbox or self.random.randrange(2)):
            self.commit(replica)
        elif replica.inbox and not replica.is_waiting:
            replica.num_steps += 1
            self.compute(replica, replica.inbox[0])

    def compute(self, replica: SimReplica, lease: Lease) -> None:
        """All of a unit, or under caution its next piece; a poisonous row ends the process."""
        pieces = lease.caution.pieces if lease.caution else (tuple(range(UNITS[lease.unit_index].num_rows)),)
        num_begun = replica.num_begun if lease.caution else 1
        running = pieces[num_begun - 1] if num_begun else ()
        if any((lease.unit_index, offset) in self.poison for offset in running):
            replica.store.is_dead = True
            self.num_events["poison taken"] += 1
        elif num_begun < len(pieces):
            replica.outbox.append(PieceBegun(lease.unit_index, lease.attempt, replica.num_begun))
            replica.num_begun, replica.is_waiting = replica.num_begun + 1, True
        else:
            self.stage(replica, lease)

    def stage(self, replica: SimReplica, lease: Lease) -> None:
        replica.inbox.remove(lease)
        replica.num_begun = 0
        self.num_generated[lease.unit_index] += 1
        if replica.epoch < self.newest_epoch():
            self.num_excused += 1  # of a driver that lost its lease and does not know
        condemned = frozenset(row.offset for row in lease.caution.condemned) if lease.caution else frozenset()
        replica.staged.append(part_of(lease.unit_index, lease.attempt, replica.epoch, condemned))

    def commit(self, replica: SimReplica) -> None:
        part = replica.staged.pop(0)
        try:
            replica.outbox.append(parts.commit_part(replica.store, part))
        except ReplyLost:
            self.num_excused += 1
            error = ("ReplyLost", "the store did not answer", "")
            replica.outbox.append(UnitReport(part.unit.index, part.attempt, error=error))
        except Died:
            self.num_excused += 1
            self.num_events["replica died at a write"] += 1

    def a_stray_goes_on(self) -> None:
        """A replica that was written off commits what it had, however late."""
        stray = self.random.choice(self.strays)
        if stray.staged and not stray.store.is_dead:
            self.commit(stray)
            self.num_events["stray commit"] += 1
        else:
            self.strays.remove(stray)

    def pick(self, among: dict[int, SimReplica]) -> int:
        return self.random.choice(sorted(among))

    def newest_epoch(self) -> int:
        return max((driver.epoch.number for driver in self.drivers if hasattr(driver, "epoch")), default=0)

    # --- what must hold --------------------------------------------------------------------------

    def look(self) -> None:
        """Read the directory as a user would."""
        now = {key: data for key, data in self.store.objects.items() if key.startswith("part-")}
        for key, data in self.visible.items():
            require(now.get(key) == data, f"I4: {key} changed or disappeared")
        for key in now.keys() - self.visible.keys():
            for row_id, status in read_statuses(now[key], key):
                require(row_id not in self.row_ids, f"I2: row {row_id} stands twice")
                self.row_ids.add(row_id)
                if status == "error":
                    self.failed_ids.add(row_id)
        self.visible = now
        success = self.store.objects.get("_SUCCESS")
        if success is not None:
            self.check_success(json.loads(success))

    def check_success(self, document: dict[str, object]) -> None:
        listed = {name: part["sha256"] for name, part in document["parts"].items()}  # type: ignore[attr-defined]
        found = {name: hashlib.sha256(data).hexdigest() for name, data in self.visible.items()}
        require(listed == found, "I7: _SUCCESS does not list what is there")
        require(self.failed_ids >= self.ids_of(self.poison), "I8: a row that ends its process has a result")
        unlucky = {row for row, num_deaths in self.bad_luck.items() if num_deaths >= 2}
        require(self.failed_ids <= self.ids_of(self.poison | unlucky), "I8: a sound row is an error")
        require(self.row_ids == set(ROW_IDS), "I7: _SUCCESS stands, and rows are missing")

    def ids_of(self, rows: Iterable[tuple[int, int]]) -> set[str]:
        return {planned_row_ids(UNITS[unit_index])[offset] for unit_index, offset in rows}

    def row_ids_now(self) -> list[str]:
        self.look()
        return sorted(self.row_ids)

    def calm_round(self) -> None:
        """Everyone goes on, nothing new goes wrong."""
        self.store.now_s += 5.0
        if not self.live_drivers() and not self.num_successes:
            self.start_a_driver_in_peace()
        for driver in self.live_drivers():
            driver.is_frozen = False
            driver.store.dies_at = -1
            self.calm_turns(driver)
        for stray in list(self.strays):
            while stray.staged and not stray.store.is_dead:
                self.commit(stray)
            self.strays.remove(stray)
        self.look()

    def start_a_driver_in_peace(self) -> None:
        try:
            self.drivers.append(SimDriver(self, ProcessStore(self.store)))
        except RunLocked:
            self.num_events["locked out"] += 1

    def calm_turns(self, driver: SimDriver) -> None:
        self.guard(driver, driver.beat)
        for replica in list(driver.replicas.values()):
            replica.is_frozen, replica.store.dies_at = False, -1
            for _ in range(2 * MAX_LEASES):
                self.work(replica)
        for replica_id in self.reachable(driver):
            if replica_id in driver.replicas:
                self.guard(driver, functools.partial(driver.hear, replica_id))
        while driver.checks and not driver.is_over:
            self.guard(driver, driver.look_up)
        self.guard(driver, driver.finalise if driver.has_all else driver.tick)

    def prove_end(self) -> None:
        require(self.row_ids_now() == sorted(ROW_IDS), "I1: the rows are not the input's")
        num_wasted = self.num_generated.total() - len(UNITS)
        require(num_wasted <= self.num_excused, f"I15: {num_wasted} units again, {self.num_excused} excused")
        before = dict(self.store.objects)
        self.start_a_driver_in_peace()
        require(self.store.objects == before, "I12: running a finished job again changed something")


def read_statuses(data: bytes, key: str) -> list[tuple[str, str]]:
    """The rows of a visible part and whether they are errors, whatever its name says."""
    try:
        table = pq.read_table(pa.BufferReader(data), columns=["row_id", "status"])
    except (pa.ArrowException, OSError) as error:
        raise Violation(f"I3: {key} is torn: {error}") from error
    return list(zip(*(table.column(name).to_pylist() for name in ("row_id", "status")), strict=True))
