"""The units nobody has leased yet, as spans: a million units in a few integers.

Every replica works forward through a span of its own, so that a compressed file is read forward and
rows with a common prefix meet the same engine. A replica without a span takes a free one, or the
upper half of the longest span of another replica: the shares even out by themselves, and the last
units are split one by one. A decision is O(1); only a split looks at all replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True)
class Span:
    """Units ``start`` to ``stop - 1``, taken from the front."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class PendingUnits:
    """Hands out each unit index once; ``give_up`` makes a lost replica's rest free again."""

    def __init__(self, unit_indexes: Iterable[int]) -> None:
        """``unit_indexes`` must ascend."""
        self._free = deque(_spans(unit_indexes))
        self._owned: dict[int, Span] = {}
        self._num_units = sum(map(len, self._free))

    def __len__(self) -> int:
        return self._num_units

    def spans(self) -> list[Span]:
        """What is pending, in no order."""
        return [*self._free, *self._owned.values()]

    def take(self, replica_id: int) -> int | None:
        """The next unit for this replica, following its last one where possible; None: all are out."""
        span = self._owned.get(replica_id) or self._find_span()
        if span is None:
            return None
        self._owned[replica_id] = span
        unit_index = span.start
        span.start += 1
        self._num_units -= 1
        if not span:
            del self._owned[replica_id]
        return unit_index

    def give_up(self, replica_id: int) -> None:
        """The replica will not come for the rest of its span."""
        span = self._owned.pop(replica_id, None)
        if span is not None:
            self._free.appendleft(span)

    def _find_span(self) -> Span | None:
        if self._free:
            return self._free.popleft()
        if not self._owned:
            return None
        owner_id, longest = max(self._owned.items(), key=lambda item: len(item[1]))
        if len(longest) == 1:
            return self._owned.pop(owner_id)
        middle = (longest.start + longest.stop) // 2
        upper = Span(middle, longest.stop)
        longest.stop = middle
        return upper


def _spans(unit_indexes: Iterable[int]) -> list[Span]:
    spans: list[Span] = []
    for index in unit_indexes:
        if spans and spans[-1].stop == index:
            spans[-1].stop = index + 1
        elif spans and spans[-1].stop > index:
            raise ValueError(f"unit indexes must ascend: {index} after {spans[-1].stop - 1}")
        else:
            spans.append(Span(index, index + 1))
    return spans
