"""Who computes which unit, and what follows when a replica or a unit fails. Pure: events in, actions out.

    unit      pending ──lease──> leased ──report──> committed                       (units)
                 ^                  │ replica lost: ask the store; there: committed, else
                 └──────────────────┴ the attempt failed ──> retried, on another replica
                                    └ its rows may have done it ──> searched for the row   (quarantine)
    replica   starting ──> loading ──> ready ──> lost, or killed because it hangs   (roster)
                  └───────────┴──────────┴──> a new id replaces it, within budgets  (restarts)

The number of replicas follows the cluster: ``on_target`` says how many it is to have now.

Committing is exclusive in the store, so a decision made on old news costs work, never a row: a report
from a replaced replica that says *committed* counts, one that says *failed* is ignored. Budgets are
kept apart: replicas that cannot start, replicas that die, units that fail, rows that take replicas down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from b2batch.cluster import verdict
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
from b2batch.cluster.policy import LEASES_BEGUN, DispatchPolicy, Loss
from b2batch.cluster.restarts import Restarts
from b2batch.cluster.roster import Held, Member, Roster
from b2batch.cluster.units import OpenUnit, UnitBook
from b2batch.cluster.verdict import ErrorText
from b2batch.errors import B2BatchError, StorageError, StorageFull
from b2batch.rows import PieceBegun, UnitCounts, UnitReport

_STORAGE_ERRORS = {error.__name__: error for error in (StorageError, StorageFull)}
_STORAGE_ATTEMPTS = 4
_STORAGE_PAUSE_S = 5.0
_NAN_LOSSES = 3
_MAX_TICK_S = 10.0


def _name_unit(unit_index: int) -> str:
    return f"unit {unit_index}"


def _one_row(unit_index: int) -> int:
    return 1


class Dispatcher:
    """Decides for one run. After ``Finish`` or ``Fail`` every event is answered with no action."""

    def __init__(
        self,
        unit_indexes: Iterable[int],
        policy: DispatchPolicy,
        describe_unit: Callable[[int], str] = _name_unit,
        num_rows: Callable[[int], int] = _one_row,
    ) -> None:
        """``unit_indexes`` are the units to do, ascending.

        ``describe_unit`` names one in an error; ``num_rows`` tells how many rows it has.
        """
        self._policy = policy  # its num_replicas is the largest target so far
        self._target = policy.num_replicas
        self._max_leases = policy.leases_per_replica
        self._describe = describe_unit
        self._roster = Roster()
        self._restarts = Restarts(policy)
        self.units = UnitBook(unit_indexes, num_rows)
        self.num_lost = 0
        self._num_nan_losses = 0
        self._now_s = 0.0
        self._paused_until_s = 0.0  # the output takes nothing: no new work until then
        self._mean_lease_s: float | None = None
        self._start_error = ""  # of the last replica that could not start
        self._has_begun = False  # as many replicas were ready as the run is to begin with
        self._has_worked = False  # some row was answered: what kills replicas is not everything
        self._is_draining = False
        self._is_over = False

    @property
    def num_leased(self) -> int:
        """Leases now held, copies included."""
        return self._roster.num_leases

    @property
    def num_ready(self) -> int:
        """Replicas that can work."""
        return self._roster.num_ready

    @property
    def num_starting(self) -> int:
        """Replicas asked for and not yet ready."""
        return len(self._roster) - self._roster.num_ready

    # --- events ----------------------------------------------------------------------------------

    def start(self, now_s: float) -> list[Action]:
        """The first actions; call it once, before any event."""
        self._now_s = now_s
        self._restarts.note_short(now_s)
        if self.units.is_done:
            return self._end(Finish())
        return self._top_up()

    def on_replica_ready(self, replica_id: int, now_s: float, node_id: str = "") -> list[Action]:
        """The replica's worker is built and waits for units."""
        if self._is_over or not self._roster.note_ready(replica_id, node_id, now_s):
            return []
        self._restarts.note_ready()
        leases = self._begin_if_enough()
        return [*self._fill(replica_id), *leases]

    def on_replica_loading(self, replica_id: int, now_s: float) -> None:
        """The replica has a process and begins to load its model; told as often as it answers so."""
        self._roster.note_loading(replica_id, now_s)

    def on_target(self, num_replicas: int) -> list[Action]:
        """So many replicas are wanted now, at least 1: nodes have joined or left.

        Who has a process is kept; what still waits for a node is taken back where it is too many.
        """
        if self._is_over:
            return []
        self._target = num_replicas
        if num_replicas > self._policy.num_replicas:
            self._policy = self._restarts.policy = replace(self._policy, num_replicas=num_replicas)
            self._max_leases = self._policy.leases_per_replica
        surplus = max(0, len(self._roster) - num_replicas)
        for replica_id in (dropped := self._roster.unplaced()[:surplus]):
            self._roster.remove(replica_id)
        kills = [KillReplica(replica_id, "no node has room for it any more") for replica_id in dropped]
        return [*kills, *self._top_up(), *self._begin_if_enough()]

    def on_replica_failed_to_start(self, replica_id: int, error: ErrorText, now_s: float) -> list[Action]:
        """The replica lives, but its worker could not be built: seldom a matter of luck."""
        return self._end_start(replica_id, error, "its worker could not be built", now_s)

    def _end_start(self, replica_id: int, error: ErrorText, reason: str, now_s: float) -> list[Action]:
        if self._roster.remove(replica_id) is None or self._is_over:
            return []
        self._restarts.note_start_failure(now_s)
        self._start_error = f"{error[0]}: {error[1]}"
        if self._restarts.gave_up:
            reason += "; as so many before it could not start either, no other is tried"
        actions: list[Action] = [KillReplica(replica_id, reason)]
        if self._restarts.cannot_start(error, self.num_ready, len(self._roster)):
            return actions + self._end(Fail(verdict.start_error(error)))
        return actions

    def on_replica_lost(self, replica_id: int, loss: Loss, detail: str, now_s: float) -> list[Action]:
        """The replica is gone; ``detail`` is what is known about it, for the message."""
        replica = self._roster.remove(replica_id)
        if self._is_over or replica is None:
            return []
        self.num_lost += 1
        self.units.give_up(replica_id)
        error = self._note_loss(replica, loss, detail, now_s)
        if error is not None:
            return self._end(Fail(error))
        open_units = [index for index in replica.leases if self.units.get(index) is not None]
        begun = list(replica.leases)[:LEASES_BEGUN]
        for unit_index in open_units:
            self._take_back(replica_id, unit_index, loss, detail, is_begun=unit_index in begun)
        if not self.num_ready:
            self._restarts.note_short(now_s)
        return [*map(CheckCommitted, open_units), *self._feed(), *self._top_up()]

    def on_report(self, replica_id: int, report: UnitReport) -> list[Action]:
        """A receipt, or a failed attempt; also from a replica written off, also twice."""
        if self._is_over:
            return []
        held = self._end_lease(replica_id, report)
        actions: list[Action] = []
        if report.error is None:
            actions += self._commit(report.unit_index, report.counts, replica_id)
        elif held:
            actions += self._attempt_failed(replica_id, report.unit_index, report.error)
        if held and not self._is_over:
            actions += self._fill(replica_id)
        return actions

    def on_piece_begun(self, replica_id: int, begun: PieceBegun) -> None:
        """The replica goes on to the next piece of a unit in quarantine: it has survived the one before."""
        replica, unit = self._roster.get(replica_id), self.units.get(begun.unit_index)
        held = replica.leases.get(begun.unit_index) if replica else None
        if unit is None or unit.quarantine is None or held is None or held.attempt != begun.attempt:
            return
        if unit.quarantine.on_piece_begun(begun.number):
            self._has_worked = True

    def on_heartbeat(self, replica_id: int, num_steps: int, now_s: float) -> None:
        """The replica answered; ``num_steps`` grows with each step of its engine."""
        self._roster.note_answer(replica_id, num_steps, now_s)

    def on_unit_checked(self, unit_index: int, counts: UnitCounts | None) -> list[Action]:
        """What the store said about a lost unit: the counts of its part, or None for no part."""
        unit = self.units.get(unit_index)
        if self._is_over or unit is None:
            return []
        if counts is not None:
            return self._commit(unit_index, counts)
        error = self._quarantine_error(unit_index, unit)
        if error is not None:
            return self._end(Fail(error))
        self.units.requeue(unit_index)
        return self._feed()

    def on_stop(self) -> list[Action]:
        """Lease and start nothing any more; what is begun goes on, and reports still count."""
        self._is_draining = True
        taken = self._roster.take_unbegun()
        for replica_id, unit_index, _ in taken:
            unit = self.units.get(unit_index)
            if unit is not None:
                unit.holders.discard(replica_id)
        return [Cancel(replica_id, unit_index, held.attempt) for replica_id, unit_index, held in taken]

    def on_tick(self, now_s: float) -> list[Action]:
        """Time went on: what hangs is killed, what is due is started. Call about once a second."""
        if self._is_over:
            return []
        pause_s = now_s - self._now_s
        if pause_s > _MAX_TICK_S:  # it slept, as on a suspended machine: nobody is late for that
            self._roster.forgive_pause(pause_s)
            self._restarts.forgive_pause(pause_s)
        self._now_s = now_s
        actions = self._kill_hung()
        if not self._is_over and not self._is_draining and self._restarts.has_timed_out(now_s):
            actions += self._end(Fail(self._start_timeout_error()))
        if not self._is_over:
            actions += self._end_slow_starts()
        if not self._is_over:
            actions += [*self._top_up(), *self._feed(), *self._help_out()]
        return actions

    # --- leases ----------------------------------------------------------------------------------

    def _has_room(self, replica: Member) -> bool:
        if self._is_draining or not self._has_begun or not replica.is_ready:
            return False
        if self._now_s < self._paused_until_s:
            return False
        if len(replica.leases) >= self._max_leases:
            return False
        return not any(map(self.units.is_quarantined, replica.leases))

    def _fill(self, replica_id: int) -> list[Action]:
        """Leases until the replica has no room or there is no unit for it."""
        replica = self._roster[replica_id]
        leases: list[Action] = []
        while self._has_room(replica):
            is_only = self.num_ready == 1
            unit_index = self.units.next_for(replica_id, is_empty=not replica.leases, is_only=is_only)
            if unit_index is None:
                break
            leases.append(self._lease(replica_id, unit_index))
        if len(replica.leases) < self._max_leases:
            self._roster.hungry[replica_id] = None
        else:
            self._roster.hungry.pop(replica_id, None)
        return leases

    def _feed(self) -> list[Action]:
        """Units came back, or a pause is over: offer them to those that have room."""
        if not self.units.has_queued:
            return []
        return [lease for replica_id in list(self._roster.hungry) for lease in self._fill(replica_id)]

    def _lease(self, replica_id: int, unit_index: int) -> Lease:
        unit = self.units.begin(unit_index, replica_id)
        self._roster.give(replica_id, unit_index, unit.num_attempts, self._now_s)
        caution = unit.quarantine.begin() if unit.quarantine else None
        trusts_nan = unit.trusts_nan or self._num_nan_losses >= _NAN_LOSSES
        return Lease(replica_id, unit_index, unit.num_attempts, caution, trusts_nan)

    def _end_lease(self, replica_id: int, report: UnitReport) -> bool:
        """Whether the report is about a lease that the replica holds; if so it is over."""
        held = self._roster.end_lease(replica_id, report.unit_index, report.attempt)
        if held is None:
            return False
        unit = self.units.get(report.unit_index)
        if unit is not None:
            unit.holders.discard(replica_id)
        if report.error is None:
            self._note_lease_time(self._now_s - held.since_s)
        return True

    def _note_lease_time(self, lease_s: float) -> None:
        mean_s = lease_s if self._mean_lease_s is None else self._mean_lease_s
        self._mean_lease_s = 0.9 * mean_s + 0.1 * lease_s

    def _help_out(self) -> list[Action]:
        """At the end: replicas with nothing to do take what others are late with, or have not come to.

        A copy a unit. Whoever commits first wins, and the other is told to leave it.
        """
        if self.units.has_queued or self._is_draining or self._now_s < self._paused_until_s:
            return []
        idle = self._roster.idle()
        if not idle:
            return []
        wanted = [
            (-position, held.since_s, unit_index)
            for unit_index, held, position in self._roster.leases()
            if (position or self._is_late(held)) and self._may_copy(unit_index)
        ]
        pairs = zip(idle, sorted(wanted), strict=False)
        return [self._copy(replica_id, unit_index) for replica_id, (_, _, unit_index) in pairs]

    def _is_late(self, held: Held) -> bool:
        if self._mean_lease_s is None:
            return False
        return held.since_s < self._now_s - self._policy.straggler_factor * self._mean_lease_s

    def _may_copy(self, unit_index: int) -> bool:
        unit = self.units.get(unit_index)
        return unit is not None and not unit.was_copied and unit.num_kills == 0

    def _copy(self, replica_id: int, unit_index: int) -> Lease:
        unit = self.units.get(unit_index)
        assert unit is not None
        unit.was_copied = True
        return self._lease(replica_id, unit_index)

    # --- outcomes --------------------------------------------------------------------------------

    def _commit(self, unit_index: int, counts: UnitCounts, replica_id: int = -1) -> list[Action]:
        unit = self.units.commit(unit_index, counts)
        if unit is None:
            return []
        self._has_worked = self._has_worked or counts.num_ok > 0
        replica = self._roster.get(replica_id)
        self._restarts.note_progress(replica.node_id if replica else "")
        if self.units.is_done:
            return self._end(Finish())
        return [action for holder in unit.holders for action in self._call_off(holder, unit_index)]

    def _call_off(self, replica_id: int, unit_index: int) -> list[Action]:
        """Another replica committed the unit that this one still computes."""
        replica = self._roster.get(replica_id)
        if replica is None:
            return []
        held = replica.leases.pop(unit_index)
        return [Cancel(replica_id, unit_index, held.attempt), *self._fill(replica_id)]

    def _attempt_failed(self, replica_id: int, unit_index: int, error: ErrorText) -> list[Action]:
        unit = self.units.get(unit_index)
        if unit is None:  # another attempt has committed it
            return []
        unit.num_failures += 1
        if unit.quarantine is not None:
            unit.quarantine.on_interrupted()
        if error[0] in _STORAGE_ERRORS:
            return self._storage_failed(unit_index, unit, error)
        unit.last_replica_id = replica_id
        fatal = verdict.final_error_class(error[0])
        if fatal is not None:
            return self._end(Fail(fatal(f"{self._describe(unit_index)}: {error[1]}")))
        if unit.num_failures >= self._policy.max_attempts:
            return self._end(Fail(verdict.unit_error(self._describe(unit_index), unit.num_failures, error)))
        self.units.requeue(unit_index)
        return self._feed()

    def _storage_failed(self, unit_index: int, unit: OpenUnit, error: ErrorText) -> list[Action]:
        """The output does not take the part: no row's and no replica's fault. Everybody waits."""
        code, message, _ = error
        if unit.num_failures >= _STORAGE_ATTEMPTS:
            raised = _STORAGE_ERRORS[code](f"{self._describe(unit_index)}: {message}")
            return self._end(Fail(raised))
        pause_s = _STORAGE_PAUSE_S * 2.0 ** (unit.num_failures - 1)
        self._paused_until_s = max(self._paused_until_s, self._now_s + pause_s)
        self.units.requeue(unit_index)
        return []

    def _take_back(
        self, replica_id: int, unit_index: int, loss: Loss, detail: str, *, is_begun: bool
    ) -> None:
        """A lost replica held this unit: what that says about its rows."""
        unit = self.units.take_back(unit_index, replica_id, detail)
        if loss is Loss.SUSPECT:
            unit.trusts_nan = True  # if it happens again elsewhere, it is the rows
        if loss.may_be_a_row and is_begun:
            if self.units.blame(unit_index, detail) and self._has_worked:
                self._restarts.note_progress("")  # a row was found
        elif unit.quarantine is not None:
            unit.quarantine.on_interrupted()

    def _quarantine_error(self, unit_index: int, unit: OpenUnit) -> B2BatchError | None:
        if unit.quarantine is None:
            return None
        if unit.quarantine.is_hopeless:
            return verdict.kills_error(self._describe(unit_index), unit.num_kills, unit.last_error)
        num_condemned = self.units.num_condemned
        if num_condemned > self._policy.max_condemned:
            return verdict.condemned_error(self._describe(unit_index), num_condemned, unit.last_error)
        return None

    # --- replicas --------------------------------------------------------------------------------

    def _note_loss(self, replica: Member, loss: Loss, detail: str, now_s: float) -> B2BatchError | None:
        """Book a loss against its budget; the error if that is spent."""
        self._num_nan_losses += loss is Loss.SUSPECT
        if not replica.is_ready and loss is not Loss.NODE:
            self._restarts.note_death_in_start(now_s)
            if self._restarts.is_start_deadly(self.num_ready, len(self._roster)):
                return verdict.start_error(("its process died", detail, ""))
            return None
        if self._has_worked and loss.may_be_a_row and any(map(self.units.is_quarantined, replica.leases)):
            return None  # the search for a row costs replicas: it has bounds of its own
        self._restarts.note_death(replica.node_id if loss.may_be_a_node else "", now_s)
        if self._restarts.are_deaths_too_many:
            return verdict.deaths_error(self._restarts.num_deaths, detail)
        return None

    @property
    def _num_wanted(self) -> int:
        return min(self._target, self.units.num_units - self.units.num_committed)

    @property
    def _num_needed(self) -> int:
        """Ready replicas without which it cannot go on: at first those it is to begin with, then one."""
        return 1 if self._has_begun else min(self._policy.min_replicas, self._num_wanted)

    def _begin_if_enough(self) -> list[Action]:
        """Leases for those that waited, where no other replica is waited for any more."""
        if self.num_ready < self._num_needed:
            return []
        self._restarts.note_enough()
        has_begun, self._has_begun = self._has_begun, True
        return [] if has_begun else self._feed()

    def _start_timeout_error(self) -> B2BatchError:
        return verdict.start_timeout_error(
            self._policy.start_timeout_s, self.num_ready, self._num_needed, self._start_error
        )

    def _end_slow_starts(self) -> list[Action]:
        """Replicas that load for longer than a start may take are ended, and replaced within the budget."""
        timeout_s = self._policy.start_timeout_s
        reason = f"its model was not loaded within {timeout_s:.0f} s (cluster.start_timeout_s)"
        return [
            action
            for replica_id in self._roster.loading_since(self._now_s - timeout_s)
            for action in self._end_start(replica_id, ("StartTimeout", reason, ""), reason, self._now_s)
        ]

    def _top_up(self) -> list[Action]:
        if self._is_draining or not self._restarts.may_start(self._now_s, len(self._roster)):
            return []
        missing = max(0, self._num_wanted - len(self._roster))
        avoided = self._restarts.avoided_nodes
        return [StartReplica(self._roster.add(), avoided) for _ in range(missing)]

    def _kill_hung(self) -> list[Action]:
        actions: list[Action] = []
        for replica_id, reason in self._roster.hung(self._now_s, self._policy):
            if not self._is_over:
                actions.append(KillReplica(replica_id, reason))
                actions += self.on_replica_lost(replica_id, Loss.HANG, reason, self._now_s)
        return actions

    def _end(self, action: Finish | Fail) -> list[Action]:
        self._is_over = True
        return [action]
