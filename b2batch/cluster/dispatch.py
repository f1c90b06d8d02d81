"""Who computes which unit, and what follows when a replica or a unit fails. Pure: events in, actions out.

    unit      pending ──lease──> leased ──report──> committed          (terminal)
                 ^                  │ replica lost: ask the store; there: committed, else
                 └──────────────────┴ the attempt failed ──> retried, on another replica
    replica   starting ──> ready ──> lost, or killed because it hangs; a new id replaces it

Committing is exclusive in the store, so a decision made on old news costs work, never a row: a report
from a replaced replica that says *committed* counts, one that says *failed* is ignored. Three budgets
are kept apart: replicas that cannot start, replicas that die, units that fail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from b2batch.cluster.pending import PendingUnits
from b2batch.errors import B2BatchError, CallerError, ClusterError, Fenced, UnitFailed
from b2batch.rows import UnitCounts, UnitReport

ErrorText = tuple[str, str, str]  # code, message, traceback
_MAX_TICK_S = 10.0


# --- actions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lease:
    """Let this replica compute this unit."""

    replica_id: int
    unit_index: int
    attempt: int


@dataclass(frozen=True, slots=True)
class StartReplica:
    """Start a replica under this new id; its life is told by ``on_replica_*``."""

    replica_id: int


@dataclass(frozen=True, slots=True)
class KillReplica:
    """End this replica now; it is already written off, so nothing needs to be told."""

    replica_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckCommitted:
    """Ask the store whether the unit's part is there, then call ``on_unit_checked``."""

    unit_index: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Every unit is committed."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The run cannot go on."""

    error: B2BatchError


Action = Lease | StartReplica | KillReplica | CheckCommitted | Finish | Fail


# --- state ---------------------------------------------------------------------------------------


class Loss(Enum):
    """Why a replica is gone. Only ``NODE`` says for sure that its units are not to blame."""

    CRASH = "its process died"
    HANG = "it hangs"
    NODE = "its node died"


@dataclass(frozen=True, slots=True)
class DispatchPolicy:
    """Budgets and limits. Times are seconds of the clock that the events carry."""

    num_replicas: int
    start_timeout_s: float
    max_leases: int = 2  # the next unit's rows fill the batch while the last one's drain
    max_attempts: int = 3  # of a unit that fails by an error
    max_kills: int = 3  # replicas one unit may take down
    hang_timeout_s: float = 60.0  # no answer at all; with many replicas see max_silence_s
    stall_timeout_s: float = 900.0  # answers, but its engine has not finished a step
    straggler_factor: float = 1.5  # of the mean lease: older ones are tried elsewhere at the end

    @property
    def max_silence_s(self) -> float:
        """How long a replica with leases may be silent; two lost answers are forgiven."""
        return max(self.hang_timeout_s, 3 * poll_timeout_s(self.num_replicas))

    @property
    def max_deaths(self) -> int:
        """Replica deaths in a row, without a commit between them, that a run survives."""
        return 3 + 3 * self.num_replicas


class _State(Enum):
    STARTING = auto()
    READY = auto()


@dataclass(slots=True)
class _Held:
    attempt: int
    since_s: float


@dataclass(slots=True)
class _Replica:
    state: _State = _State.STARTING
    leases: dict[int, _Held] = field(default_factory=dict)
    answered_s: float = 0.0
    moved_s: float = 0.0
    num_steps: int = -1


@dataclass(slots=True)
class _Unit:
    """A unit between its first lease and its commit."""

    holders: set[int] = field(default_factory=set)
    num_attempts: int = 0
    num_failures: int = 0
    num_kills: int = 0
    last_replica_id: int = -1
    is_queued: bool = False
    was_copied: bool = False
    last_error: str = ""

    @property
    def is_suspect(self) -> bool:
        """It killed two replicas: it runs alone, so that a third death names the right unit."""
        return self.num_kills >= 2


def _name_unit(unit_index: int) -> str:
    return f"unit {unit_index}"


class Dispatcher:
    """Decides for one run. After ``Finish`` or ``Fail`` every event is answered with no action."""

    def __init__(
        self,
        unit_indexes: Iterable[int],
        policy: DispatchPolicy,
        describe_unit: Callable[[int], str] = _name_unit,
    ) -> None:
        """``unit_indexes`` are the units to do, ascending; ``describe_unit`` names one in an error."""
        self._policy = policy
        self._describe = describe_unit
        self._pending = PendingUnits(unit_indexes)
        self._is_open = _flags(self._pending)
        self.num_units = len(self._pending)
        self.num_committed = 0
        self.num_lost = 0
        self.counts = UnitCounts()
        self._retries: deque[int] = deque()
        self._units: dict[int, _Unit] = {}
        self._replicas: dict[int, _Replica] = {}
        self._hungry: dict[int, None] = {}  # ready replicas with room for which there was no unit
        self._next_replica_id = 0
        self._num_ready = 0  # kept, not counted: it is asked for with every answer
        self._now_s = 0.0
        self._none_ready_since_s: float | None = 0.0
        self._was_ever_ready = False
        self._earliest_start_s = 0.0
        self._deaths_in_a_row = 0
        self._start_failures_in_a_row = 0
        self._mean_lease_s: float | None = None
        self._is_draining = False
        self._is_over = False

    @property
    def num_leased(self) -> int:
        """Leases now held, copies included."""
        return sum(len(replica.leases) for replica in self._replicas.values())

    @property
    def num_ready(self) -> int:
        """Replicas that can work."""
        return self._num_ready

    @property
    def num_starting(self) -> int:
        """Replicas asked for and not yet ready."""
        return len(self._replicas) - self.num_ready

    # --- events ----------------------------------------------------------------------------------

    def start(self, now_s: float) -> list[Action]:
        """The first actions; call it once, before any event."""
        self._now_s = now_s
        self._none_ready_since_s = now_s
        if self.num_committed == self.num_units:
            return self._end(Finish())
        return self._top_up()

    def on_replica_ready(self, replica_id: int, now_s: float) -> list[Action]:
        """The replica's worker is built and waits for units."""
        replica = self._replicas.get(replica_id)
        if self._is_over or replica is None or replica.state is _State.READY:
            return []
        replica.state = _State.READY
        self._num_ready += 1
        self._was_ever_ready = True
        replica.answered_s = replica.moved_s = now_s
        self._start_failures_in_a_row = 0
        self._none_ready_since_s = None
        return [*self._fill(replica_id)]

    def on_replica_failed_to_start(self, replica_id: int, error: ErrorText, now_s: float) -> list[Action]:
        """The replica lives, but its worker could not be built: seldom a matter of luck."""
        replica = self._remove_replica(replica_id)
        if self._is_over or replica is None:
            return []
        self._start_failures_in_a_row += 1
        actions: list[Action] = [KillReplica(replica_id, "its worker could not be built")]
        if self._cannot_start(error):
            return actions + self._end(Fail(_start_error(error)))
        if self._was_ever_ready:  # it can be done here, so it is worth another try, but not at once
            self._earliest_start_s = now_s + min(30.0, 2.0**self._start_failures_in_a_row)
        return actions

    def on_replica_lost(self, replica_id: int, loss: Loss, detail: str, now_s: float) -> list[Action]:
        """The replica is gone; ``detail`` is what is known about it, for the message."""
        replica = self._remove_replica(replica_id)
        if self._is_over or replica is None:
            return []
        self.num_lost += 1
        self._deaths_in_a_row += 1
        self._hungry.pop(replica_id, None)
        self._pending.give_up(replica_id)
        if self._deaths_in_a_row > self._policy.max_deaths:
            return self._end(Fail(_deaths_error(self._deaths_in_a_row, detail)))
        open_units = [index for index in replica.leases if index in self._units]
        checks = [self._take_back(replica_id, index, loss, detail) for index in open_units]
        self._note_none_ready(now_s)
        self._delay_starts(now_s)
        return [*checks, *self._feed(), *self._top_up()]

    def on_report(self, replica_id: int, report: UnitReport) -> list[Action]:
        """A receipt, or a failed attempt; also from a replica written off, also twice."""
        if self._is_over:
            return []
        held = self._end_lease(replica_id, report)
        actions: list[Action] = []
        if report.error is None:
            actions += self._commit(report.unit_index, report.counts)
        elif held:
            actions += self._attempt_failed(replica_id, report.unit_index, report.error)
        if held and not self._is_over:
            actions += self._fill(replica_id)
        return actions

    def on_heartbeat(self, replica_id: int, num_steps: int, now_s: float) -> list[Action]:
        """The replica answered; ``num_steps`` grows with each step of its engine."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            return []
        replica.answered_s = now_s
        if num_steps != replica.num_steps:
            replica.num_steps = num_steps
            replica.moved_s = now_s
        return []

    def on_unit_checked(self, unit_index: int, counts: UnitCounts | None) -> list[Action]:
        """What the store said about a lost unit: the counts of its part, or None for no part."""
        unit = self._units.get(unit_index)
        if self._is_over or unit is None:
            return []
        if counts is not None:
            return self._commit(unit_index, counts)
        if unit.num_kills >= self._policy.max_kills:
            return self._end(Fail(self._kills_error(unit_index, unit)))
        self._requeue(unit_index, unit)
        return [*self._feed()]

    def on_stop(self) -> None:
        """Lease and start nothing any more; reports still count."""
        self._is_draining = True

    def on_tick(self, now_s: float) -> list[Action]:
        """Time went on: what hangs is killed, what is due is started. Call about once a second."""
        if self._is_over:
            return []
        self._forgive_own_pause(now_s)
        self._now_s = now_s
        actions = self._kill_hung()
        if not self._is_over and self._start_timed_out():
            actions += self._end(Fail(_start_timeout_error(self._policy.start_timeout_s)))
        if not self._is_over:
            actions += [*self._top_up(), *self._copy_stragglers()]
        return actions

    # --- leases ----------------------------------------------------------------------------------

    def _has_room(self, replica: _Replica) -> bool:
        if self._is_draining or replica.state is not _State.READY:
            return False
        if len(replica.leases) >= self._policy.max_leases:
            return False
        return not any(self._units[unit].is_suspect for unit in replica.leases if unit in self._units)

    def _fill(self, replica_id: int) -> list[Action]:
        """Leases until the replica has no room or there is no unit for it."""
        replica = self._replicas[replica_id]
        leases: list[Action] = []
        while self._has_room(replica):
            unit_index = self._next_unit(replica_id, replica)
            if unit_index is None:
                self._hungry[replica_id] = None
                return leases
            leases.append(self._lease(replica_id, replica, unit_index))
        self._hungry.pop(replica_id, None)
        return leases

    def _feed(self) -> list[Action]:
        """Units came back: offer them to those that had none."""
        if not self._retries and not self._pending:
            return []
        return [lease for replica_id in list(self._hungry) for lease in self._fill(replica_id)]

    def _next_unit(self, replica_id: int, replica: _Replica) -> int | None:
        for position, unit_index in enumerate(self._retries):
            unit = self._units[unit_index]
            if self._may_retry(replica_id, replica, unit):
                del self._retries[position]
                unit.is_queued = False
                return unit_index
        return self._pending.take(replica_id)

    def _may_retry(self, replica_id: int, replica: _Replica, unit: _Unit) -> bool:
        if unit.is_suspect and replica.leases:
            return False
        return unit.last_replica_id != replica_id or self.num_ready == 1

    def _lease(self, replica_id: int, replica: _Replica, unit_index: int) -> Lease:
        unit = self._units.setdefault(unit_index, _Unit())
        unit.num_attempts += 1
        unit.holders.add(replica_id)
        if not replica.leases:
            replica.moved_s = self._now_s
        replica.leases[unit_index] = _Held(unit.num_attempts, self._now_s)
        return Lease(replica_id, unit_index, unit.num_attempts)

    def _end_lease(self, replica_id: int, report: UnitReport) -> bool:
        """Whether the report is about a lease that the replica holds; if so it is over."""
        replica = self._replicas.get(replica_id)
        held = replica.leases.get(report.unit_index) if replica else None
        if replica is None or held is None or held.attempt != report.attempt:
            return False
        del replica.leases[report.unit_index]
        unit = self._units.get(report.unit_index)
        if unit is not None:
            unit.holders.discard(replica_id)
        if report.error is None:
            self._note_lease_time(self._now_s - held.since_s)
        return True

    def _note_lease_time(self, lease_s: float) -> None:
        mean_s = lease_s if self._mean_lease_s is None else self._mean_lease_s
        self._mean_lease_s = 0.9 * mean_s + 0.1 * lease_s

    def _copy_stragglers(self) -> list[Action]:
        """At the end, lease what takes too long a second time to replicas with nothing to do."""
        if self._retries or self._pending or self._is_draining or self._mean_lease_s is None:
            return []
        idle = [key for key in self._hungry if not self._replicas[key].leases]
        if not idle:
            return []
        overdue_s = self._now_s - self._policy.straggler_factor * self._mean_lease_s
        late = [
            (held.since_s, unit_index)
            for replica in self._replicas.values()
            for unit_index, held in replica.leases.items()
            if held.since_s < overdue_s and self._may_copy(unit_index)
        ]
        pairs = zip(idle, sorted(late), strict=False)
        return [self._copy(replica_id, unit_index) for replica_id, (_, unit_index) in pairs]

    def _may_copy(self, unit_index: int) -> bool:
        unit = self._units.get(unit_index)
        return unit is not None and not unit.was_copied and unit.num_kills == 0

    def _copy(self, replica_id: int, unit_index: int) -> Lease:
        self._units[unit_index].was_copied = True
        return self._lease(replica_id, self._replicas[replica_id], unit_index)

    # --- outcomes --------------------------------------------------------------------------------

    def _commit(self, unit_index: int, counts: UnitCounts) -> list[Action]:
        if not (0 <= unit_index < len(self._is_open) and self._is_open[unit_index]):
            return []  # known already, or not of this run
        self._is_open[unit_index] = 0
        unit = self._units.pop(unit_index, None)
        if unit is not None and unit.is_queued:
            self._retries.remove(unit_index)
        self.num_committed += 1
        self.counts += counts
        self._deaths_in_a_row = 0
        return self._end(Finish()) if self.num_committed == self.num_units else []

    def _attempt_failed(self, replica_id: int, unit_index: int, error: ErrorText) -> list[Action]:
        unit = self._units.get(unit_index)
        if unit is None:  # another attempt has committed it
            return []
        unit.num_failures += 1
        unit.last_replica_id = replica_id
        fatal = _final_error_class(error[0])
        if fatal is not None:
            return self._end(Fail(fatal(f"{self._describe(unit_index)}: {error[1]}")))
        if unit.num_failures >= self._policy.max_attempts:
            return self._end(Fail(self._unit_error(unit_index, unit, error)))
        self._requeue(unit_index, unit)
        return [*self._feed()]

    def _take_back(self, replica_id: int, unit_index: int, loss: Loss, detail: str) -> CheckCommitted:
        unit = self._units[unit_index]
        unit.holders.discard(replica_id)
        unit.last_replica_id = replica_id
        unit.last_error = detail
        unit.num_kills += loss is not Loss.NODE
        return CheckCommitted(unit_index)

    def _requeue(self, unit_index: int, unit: _Unit) -> None:
        if not unit.holders and not unit.is_queued:
            unit.is_queued = True
            self._retries.append(unit_index)

    # --- replicas --------------------------------------------------------------------------------

    def _top_up(self) -> list[Action]:
        if self._is_draining or self._now_s < self._earliest_start_s:
            return []
        if self._replicas and (self._gave_up_starting or not self._was_ever_ready):
            return []
        wanted = min(self._policy.num_replicas, self.num_units - self.num_committed)
        missing = max(0, wanted - len(self._replicas))
        return [self._start_replica() for _ in range(missing)]

    def _start_replica(self) -> StartReplica:
        replica_id = self._next_replica_id
        self._next_replica_id += 1
        self._replicas[replica_id] = _Replica()
        return StartReplica(replica_id)

    def _remove_replica(self, replica_id: int) -> _Replica | None:
        replica = self._replicas.pop(replica_id, None)
        if replica is not None and replica.state is _State.READY:
            self._num_ready -= 1
        return replica

    @property
    def _gave_up_starting(self) -> bool:
        return self._start_failures_in_a_row > 3 + self._policy.num_replicas

    def _cannot_start(self, error: ErrorText) -> bool:
        """No replica works, and enough of them said why that more would say the same."""
        if self.num_ready:
            return False
        if self._was_ever_ready:
            return self._gave_up_starting and not self._replicas
        is_certain = _final_error_class(error[0]) is not None or not self._replicas
        return is_certain or self._start_failures_in_a_row >= 16

    def _note_none_ready(self, now_s: float) -> None:
        if self._none_ready_since_s is None and not self.num_ready:
            self._none_ready_since_s = now_s

    def _delay_starts(self, now_s: float) -> None:
        """The first round of deaths is replaced at once, later ones after 1, 2, 4 … 30 s."""
        num_rounds = (self._deaths_in_a_row - 1) // self._policy.num_replicas
        if num_rounds:
            self._earliest_start_s = now_s + min(30.0, 2.0 ** (num_rounds - 1))

    def _start_timed_out(self) -> bool:
        since_s = self._none_ready_since_s
        return (
            since_s is not None
            and not self._is_draining
            and self._now_s - since_s >= self._policy.start_timeout_s
        )

    def _forgive_own_pause(self, now_s: float) -> None:
        """A driver that slept (a suspended machine) must not take its replicas for dead."""
        pause_s = now_s - self._now_s
        if pause_s > _MAX_TICK_S:
            for replica in self._replicas.values():
                replica.answered_s += pause_s
                replica.moved_s += pause_s

    def _kill_hung(self) -> list[Action]:
        actions: list[Action] = []
        max_silence_s = self._policy.max_silence_s
        for replica_id, replica in list(self._replicas.items()):
            reason = self._hang_reason(replica, max_silence_s)
            if reason and not self._is_over:
                actions.append(KillReplica(replica_id, reason))
                actions += self.on_replica_lost(replica_id, Loss.HANG, reason, self._now_s)
        return actions

    def _hang_reason(self, replica: _Replica, max_silence_s: float) -> str | None:
        if not replica.leases:
            return None
        silent_s = self._now_s - replica.answered_s
        if silent_s >= max_silence_s:
            return f"it has not answered for {silent_s:.0f} s"
        stalled_s = self._now_s - replica.moved_s
        if stalled_s >= self._policy.stall_timeout_s:
            return f"its engine has not finished a step for {stalled_s:.0f} s"
        return None

    # --- the end ---------------------------------------------------------------------------------

    def _end(self, action: Finish | Fail) -> list[Action]:
        self._is_over = True
        return [action]

    def _kills_error(self, unit_index: int, unit: _Unit) -> ClusterError:
        return ClusterError(
            f"{self._describe(unit_index)}: {unit.num_kills} replicas died while they computed it; "
            f"the last one: {unit.last_error}"
        )

    def _unit_error(self, unit_index: int, unit: _Unit, error: ErrorText) -> UnitFailed:
        code, message, traceback = error
        return UnitFailed(
            f"{self._describe(unit_index)}: failed {unit.num_failures} times, last with {code}: {message}\n"
            f"{traceback}"
        )


def poll_timeout_s(num_replicas: int) -> float:
    """How long a replica that has no news may be silent: with many longer, as each answer costs the driver.

    So that a thousand replicas that finish a unit a minute cost little more than their reports.
    """
    return min(50.0, max(1.0, num_replicas / 20))


def _flags(pending: PendingUnits) -> bytearray:
    """One byte a unit index, 1 where the unit is to be done."""
    spans = pending.spans()
    flags = bytearray(max((span.stop for span in spans), default=0))
    for span in spans:
        flags[span.start : span.stop] = b"\x01" * len(span)
    return flags


def _error_classes(root: type[B2BatchError]) -> dict[str, type[B2BatchError]]:
    classes = {root.__name__: root}
    for subclass in root.__subclasses__():
        classes.update(_error_classes(subclass))
    return classes


def _final_error_class(code: str) -> type[B2BatchError] | None:
    """The class of an error that another attempt cannot mend: the caller's, drift, a lost lease."""
    error_class = _error_classes(B2BatchError).get(code)
    if error_class is None or (error_class.exit_code == 1 and error_class is not Fenced):
        return None
    return error_class


def _start_error(error: ErrorText) -> B2BatchError:
    code, message, traceback = error
    error_class = _final_error_class(code)
    if error_class is not None and issubclass(error_class, CallerError):
        return error_class(message)
    return ClusterError(f"no replica could be started: {code}: {message}\n{traceback}")


def _deaths_error(num_deaths: int, detail: str) -> ClusterError:
    return ClusterError(f"{num_deaths} replicas died in a row and no unit was committed; the last: {detail}")


def _start_timeout_error(timeout_s: float) -> ClusterError:
    return ClusterError(f"no replica was ready within {timeout_s:.0f} s (cluster.start_timeout_s)")
