"""Where sequences keep their keys and values: contiguous spans of one arena. Ints only.

Offline, a request's prompt and ``max_tokens`` are known when it is admitted, so a span can be made
to fit and needs no page table: attention reads a slice. What paging is for elsewhere, sharing, is
done by *prefix spans*, which many sequences attend to and none owns.

    arena   |--prefix A--|--seq 3--|....free....|--seq 7--|--seq 9--|..free..|
                          start     start+size
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Span:
    """The half-open token range [start, start + size) of the arena."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class SpanAllocator:
    """First-fit allocation of spans; neighbours that are freed join again."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._free: list[tuple[int, int]] = [(0, num_tokens)]  # (start, stop), sorted, never adjacent

    @property
    def num_free(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def allocate(self, size: int) -> Span | None:
        """A span of ``size`` tokens, or None when no free stretch is long enough."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= size:
                self._take(index, start, size)
                return Span(start, size)
        return None

    def extend(self, span: Span, size: int) -> bool:
        """Grow ``span`` in place to ``size`` tokens if what follows it is free."""
        index = bisect_left(self._free, (span.stop, 0))
        if index == len(self._free) or self._free[index][0] != span.stop:
            return False
        more = size - span.size
        if self._free[index][1] - span.stop < more:
            return False
        self._take(index, span.stop, more)
        span.size = size
        return True

    def free(self, span: Span) -> None:
        """Give a span back; it must have come from here and be freed once."""
        start, stop = span.start, span.stop
        index = bisect_left(self._free, (start, stop))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
        insort(self._free, (start, stop))

    def _take(self, index: int, start: int, size: int) -> None:
        stop = self._free[index][1]
        if stop - start == size:
            del self._free[index]
        else:
            self._free[index] = (start + size, stop)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the free list is sorted, disjoint, coalesced and inside the arena."""
        last = -1
        for start, stop in self._free:
            assert last < start < stop <= self.num_tokens, self._free
            last = stop


@dataclass(slots=True, eq=False)
class PrefixSpan:
    """Keys and values of a token prefix, computed once, attended to by every sequence that starts so.

    ``num_computed`` of its tokens are in the arena; ``num_users`` sequences hold it right now.
    """

    tokens: tuple[int, ...]
    span: Span
    num_computed: int = 0
    num_users: int = 0
    last_used: int = 0

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class PrefixCache:
    """The prefixes that are warm; those without users give way when the arena is full."""

    allocator: SpanAllocator
    _by_tokens: dict[tuple[int, ...], PrefixSpan] = field(default_factory=dict)
    _clock: int = 0

    def __iter__(self) -> Iterator[PrefixSpan]:
        return iter(self._by_tokens.values())

    def longest_match(self, tokens: list[int]) -> tuple[int, ...]:
        """The longest warm prefix that leaves ``tokens`` at least one token of its own, or ()."""
        lengths = sorted({p.length for p in self}, reverse=True)
        for length in lengths:
            if length < len(tokens):
                head = tuple(tokens[:length])
                if head in self._by_tokens:
                    return head
        return ()

    def acquire(self, tokens: tuple[int, ...]) -> PrefixSpan | None:
        """The prefix's span with one more user, allocated if it is new; None when there is no room."""
        prefix = self._by_tokens.get(tokens)
        if prefix is None:
            span = self.allocate(len(tokens))
            if span is None:
                return None
            prefix = self._by_tokens[tokens] = PrefixSpan(tokens, span)
        self._clock += 1
        prefix.num_users += 1
        prefix.last_used = self._clock
        return prefix

    def release(self, prefix: PrefixSpan) -> None:
        """One user less. A prefix that nobody computed to its end is of no use to the next."""
        prefix.num_users -= 1
        if not prefix.num_users and prefix.num_computed < prefix.length:
            self._drop(prefix)

    def allocate(self, size: int) -> Span | None:
        """A span from the arena, making room by dropping unused prefixes, least recently used first."""
        while (span := self.allocator.allocate(size)) is None:
            idle = [prefix for prefix in self if not prefix.num_users]
            if not idle:
                return None
            self._drop(min(idle, key=lambda prefix: prefix.last_used))
        return span

    def _drop(self, prefix: PrefixSpan) -> None:
        del self._by_tokens[prefix.tokens]
        self.allocator.free(prefix.span)
