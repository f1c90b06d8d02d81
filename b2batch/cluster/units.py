"""The units of a run: which are still to be done, in which order, and what became of each attempt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from b2batch.cluster.pending import PendingUnits
from b2batch.cluster.quarantine import Quarantine
from b2batch.rows import UnitCounts


@dataclass(slots=True)
class OpenUnit:
    """A unit between its first lease and its commit. ``quarantine`` is set once it took a replica down."""

    holders: set[int] = field(default_factory=set)
    num_attempts: int = 0
    num_failures: int = 0
    num_kills: int = 0
    last_replica_id: int = -1
    is_queued: bool = False
    was_copied: bool = False
    trusts_nan: bool = False
    last_error: str = ""
    quarantine: Quarantine | None = None


class UnitBook:
    """Hands out each unit until it is committed; a unit is in the queue, held, or being checked."""

    def __init__(self, unit_indexes: Iterable[int], num_rows: Callable[[int], int]) -> None:
        """``unit_indexes`` ascend; ``num_rows`` tells a unit's rows once they are of interest."""
        self._num_rows = num_rows
        self._pending = PendingUnits(unit_indexes)
        self._is_open = _flags(self._pending)
        self._retries: deque[int] = deque()
        self._units: dict[int, OpenUnit] = {}
        self.num_units = len(self._pending)
        self.num_committed = 0
        self.num_attempts = 0
        self.num_rows_again = 0  # of units whose earlier attempt was lost, failed or is copied
        self.num_condemned = 0  # rows; those of units that were committed meanwhile included
        self.counts = UnitCounts()

    @property
    def has_queued(self) -> bool:
        """Whether a unit waits that nobody computes."""
        return bool(self._retries or self._pending)

    @property
    def is_done(self) -> bool:
        return self.num_committed == self.num_units

    def get(self, unit_index: int) -> OpenUnit | None:
        """What is known of a unit that was leased and is not committed."""
        return self._units.get(unit_index)

    def is_quarantined(self, unit_index: int) -> bool:
        """Whether the unit took a replica down: then it runs alone, so that a death names it."""
        unit = self._units.get(unit_index)
        return unit is not None and unit.quarantine is not None

    def next_for(self, replica_id: int, *, is_empty: bool, is_only: bool) -> int | None:
        """A unit for a replica: one that came back, else the next of its own stretch.

        ``is_empty``: it holds nothing else. ``is_only``: no other replica could take what failed here.
        """
        for position, unit_index in enumerate(self._retries):
            unit = self._units[unit_index]
            may_be_here = is_only or unit.last_replica_id != replica_id
            if may_be_here and (is_empty or unit.quarantine is None):
                del self._retries[position]
                unit.is_queued = False
                return unit_index
        return self._pending.take(replica_id)

    def begin(self, unit_index: int, replica_id: int) -> OpenUnit:
        """Book an attempt of a replica."""
        unit = self._units.setdefault(unit_index, OpenUnit())
        unit.num_attempts += 1
        unit.holders.add(replica_id)
        self.num_attempts += 1
        if unit.num_attempts > 1:
            self.num_rows_again += self._num_rows(unit_index)
        return unit

    def requeue(self, unit_index: int) -> None:
        """Let it be computed again, unless somebody still does."""
        unit = self._units[unit_index]
        if not unit.holders and not unit.is_queued:
            unit.is_queued = True
            self._retries.append(unit_index)

    def give_up(self, replica_id: int) -> None:
        """The replica will not come for the rest of its stretch."""
        self._pending.give_up(replica_id)

    def take_back(self, unit_index: int, replica_id: int, detail: str) -> OpenUnit:
        """The replica that held it is gone."""
        unit = self._units[unit_index]
        unit.holders.discard(replica_id)
        unit.last_replica_id = replica_id
        unit.last_error = detail
        return unit

    def blame(self, unit_index: int, detail: str) -> int:
        """It took its replica down; how many rows are condemned for it now that were not before."""
        unit = self._units[unit_index]
        unit.num_kills += 1
        if unit.quarantine is None:
            unit.quarantine = Quarantine(self._num_rows(unit_index))
            return 0
        num_before = unit.quarantine.num_condemned
        unit.quarantine.on_death(detail)
        num_new = unit.quarantine.num_condemned - num_before
        self.num_condemned += num_new
        return num_new

    def commit(self, unit_index: int, counts: UnitCounts) -> OpenUnit | None:
        """Book its part; None when that was known already, or the unit is not of this run."""
        if not (0 <= unit_index < len(self._is_open) and self._is_open[unit_index]):
            return None
        self._is_open[unit_index] = 0
        unit = self._units.pop(unit_index, None) or OpenUnit()
        if unit.is_queued:
            self._retries.remove(unit_index)
        self.num_committed += 1
        self.counts += counts
        return unit


def _flags(pending: PendingUnits) -> bytearray:
    """One byte a unit index, 1 where the unit is to be done."""
    spans = pending.spans()
    flags = bytearray(max((span.stop for span in spans), default=0))
    for span in spans:
        flags[span.start : span.stop] = b"\x01" * len(span)
    return flags
