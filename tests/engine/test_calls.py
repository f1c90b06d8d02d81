"""Attention calls against the chunks they stand for: every query once, with its own keys, little padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from b2batch.engine.calls import plan_calls
from b2batch.engine.kv import PrefixSpan, SlabAllocator, Span, SpanAllocator
from b2batch.engine.scheduler import Chunk
from b2batch.engine.sequence import Sequence
from b2batch.spec import SamplingSpec

ARENA = 4096


@st.composite
def steps(draw: st.DrawFn) -> list[Chunk]:
    """Chunks of sequences whose spans come from slabs and from in between, some given back before."""
    arena = SpanAllocator(ARENA)
    slabs = SlabAllocator(arena)
    prefixes = [None, PrefixSpan((1, 2, 3), Span(ARENA, 3)), PrefixSpan((4,), Span(ARENA + 3, 1))]
    chunks = []
    for prefix in sorted(draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=24))):
        size = draw(st.integers(1, 120))
        span = (slabs.allocate(size) if draw(st.booleans()) else None) or arena.allocate(size)
        assert span is not None
        if draw(st.integers(0, 3)) == 0 and slabs.owns(span):
            slabs.free(span)  # leaves a hole, or the next one takes its place
            continue
        num_past = draw(st.integers(0, size - 1))
        num_tokens = 1 if draw(st.booleans()) else draw(st.integers(1, size - num_past))
        sequence = Sequence("s", 0, [0] * size, SamplingSpec(), 1)
        sequence.span = span
        chunks.append(
            Chunk(sequence, num_past, num_tokens, span.start + num_past, num_past, prefixes[prefix])
        )
    return chunks


@given(steps(), st.sampled_from([None, 0, 40, 10_000]))
def test_every_query_attends_to_its_own_keys_once(chunks: list[Chunk], padding_tokens: int | None) -> None:
    calls = plan_calls(chunks, padding_tokens)
    found = {}
    for own in calls.own:
        found[own.query] = (own.num_queries, own.key, own.num_keys)
    for decode in calls.decode:
        for row, (query, length) in enumerate(zip(decode.queries, decode.lengths, strict=True)):
            if length:
                assert query not in found
                found[query] = (1, decode.key + row * decode.stride, length)
    expected, query = {}, 0
    for chunk in chunks:
        expected[query] = (chunk.num_tokens, chunk.slot - chunk.num_past, chunk.num_past + chunk.num_tokens)
        query += chunk.num_tokens
    assert found == expected


@given(steps(), st.integers(0, 200))
def test_what_is_read_in_vain_is_bounded(chunks: list[Chunk], padding_tokens: int) -> None:
    for call in plan_calls(chunks, padding_tokens).decode:
        assert call.stride >= call.num_keys  # a row's keys lie within its span
        num_rows = sum(length > 0 for length in call.lengths)
        assert len(call.lengths) * call.num_keys - sum(call.lengths) <= padding_tokens * (num_rows - 1)


@given(steps())
def test_a_prefix_is_attended_to_once_for_all_that_share_it(chunks: list[Chunk]) -> None:
    shared = [chunk for chunk in chunks if chunk.prefix is not None]
    calls = plan_calls(chunks).prefix
    assert len(calls) == len({id(chunk.prefix) for chunk in shared})
    assert sum(call.num_queries for call in calls) == sum(chunk.num_tokens for chunk in shared)


def test_neighbours_of_one_size_are_one_call() -> None:
    arena = SpanAllocator(ARENA)
    slabs = SlabAllocator(arena)
    chunks = []
    for _ in range(8):
        sequence = Sequence("s", 0, [0] * 50, SamplingSpec(), 1)
        sequence.span = slabs.allocate(50)
        assert sequence.span is not None
        chunks.append(Chunk(sequence, 49, 1, sequence.span.start + 49, 49))
    calls = plan_calls(chunks, padding_tokens=0)
    assert [len(call.queries) for call in calls.decode] == [8]
    assert not calls.own
