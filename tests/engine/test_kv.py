"""The arena's bookkeeping against a bitmap that cannot be wrong."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from b2batch.engine.kv import PrefixCache, PrefixSpan, Span, SpanAllocator

ARENA = 64


class ArenaMachine(RuleBasedStateMachine):
    """Spans and prefixes that come and go; ``owner`` says token by token whose the arena is."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = SpanAllocator(ARENA)
        self.prefixes = PrefixCache(self.allocator)
        self.spans: list[Span] = []
        self.held: list[PrefixSpan] = []

    def owner(self) -> list[object | None]:
        owner: list[object | None] = [None] * ARENA
        for span in [*self.spans, *(prefix.span for prefix in self.prefixes)]:
            for token in range(span.start, span.stop):
                assert owner[token] is None, "two spans share a token"
                owner[token] = span
        return owner

    def longest_free(self, besides: set[int] = frozenset()) -> int:  # type: ignore[assignment]
        """The longest free stretch, if the spans with the ids in ``besides`` were free too."""
        longest = run = 0
        for owner in self.owner():
            run = run + 1 if owner is None or id(owner) in besides else 0
            longest = max(longest, run)
        return longest

    def idle(self) -> set[int]:
        return {id(prefix.span) for prefix in self.prefixes if not prefix.num_users}

    @rule(size=st.integers(1, ARENA))
    def allocate(self, size: int) -> None:
        fits = self.longest_free(self.idle()) >= size
        span = self.prefixes.allocate(size)
        assert (span is not None) is fits
        if span is not None:
            assert span.size == size
            self.spans.append(span)

    @precondition(lambda self: self.spans)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.spans) - 1))
        self.allocator.free(self.spans.pop(index))

    @precondition(lambda self: self.spans)
    @rule(data=st.data(), more=st.integers(1, ARENA))
    def extend(self, data: st.DataObject, more: int) -> None:
        span = data.draw(st.sampled_from(self.spans))
        after = self.owner()[span.stop : span.stop + more]
        fits = len(after) == more and all(owner is None for owner in after)
        start, size = span.start, span.size
        assert self.allocator.extend(span, size + more) is fits
        assert (span.start, span.size) == (start, size + more if fits else size)

    @rule(first=st.integers(0, 2), length=st.integers(1, 20))
    def acquire(self, first: int, length: int) -> None:
        tokens = (first,) * length
        warm = any(prefix.tokens == tokens for prefix in self.prefixes)
        fits = warm or self.longest_free(self.idle()) >= length
        prefix = self.prefixes.acquire(tokens)
        assert (prefix is not None) is fits
        if prefix is not None:
            assert prefix.tokens == tokens
            assert prefix.span.size == length
            self.held.append(prefix)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_computed=st.booleans())
    def release(self, data: st.DataObject, is_computed: bool) -> None:
        prefix = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        prefix.num_computed = prefix.length if is_computed else prefix.num_computed
        self.prefixes.release(prefix)

    @rule(first=st.integers(0, 2), length=st.integers(1, 20))
    def match(self, first: int, length: int) -> None:
        tokens = [first] * length
        found = self.prefixes.longest_match(tokens)
        warm = [
            p.length for p in self.prefixes if p.tokens == tuple(tokens[: p.length]) and p.length < length
        ]
        assert len(found) == max(warm, default=0)

    @invariant()
    def every_token_is_accounted_for(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.num_free == sum(owner is None for owner in self.owner())

    @invariant()
    def a_held_prefix_stays(self) -> None:
        for prefix in self.held:
            assert prefix.num_users == sum(other is prefix for other in self.held)
            assert any(other is prefix for other in self.prefixes)

    @invariant()
    def an_idle_prefix_is_complete(self) -> None:
        for prefix in self.prefixes:
            assert prefix.num_users or prefix.num_computed == prefix.length


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40)


def test_the_least_recently_used_prefix_gives_way() -> None:
    prefixes = PrefixCache(SpanAllocator(30))
    for first in (1, 2, 3):
        prefix = prefixes.acquire((first,) * 10)
        assert prefix is not None
        prefix.num_computed = 10
        prefixes.release(prefix)
    again = prefixes.acquire((1,) * 10)
    assert again is not None
    prefixes.release(again)
    assert prefixes.allocate(10) is not None
    assert {prefix.tokens[0] for prefix in prefixes} == {1, 3}
