"""Attention calls against the chunks they stand for: every query once, with its own keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.engine.calls import plan_calls
from b2batch.engine.kv import PrefixSpan, Span
from b2batch.engine.scheduler import Chunk
from b2batch.engine.sequence import Sequence
from b2batch.spec import SamplingSpec


@st.composite
def steps(draw: st.DrawFn) -> list[Chunk]:
    """Chunks of sequences, those of one prefix next to each other."""
    prefixes = [None, PrefixSpan((1, 2, 3), Span(9000, 3)), PrefixSpan((4,), Span(9003, 1))]
    chunks = []
    for row, prefix in enumerate(sorted(draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=24)))):
        size = draw(st.integers(1, 120))
        num_past = draw(st.integers(0, size - 1))
        num_tokens = 1 if draw(st.booleans()) else draw(st.integers(1, size - num_past))
        sequence = Sequence("s", 0, [0] * size, SamplingSpec(), 1)
        sequence.span = Span(200 * row, size)
        chunks.append(Chunk(sequence, num_past, num_tokens, 200 * row + num_past, num_past, prefixes[prefix]))
    return chunks


@pytest.mark.parametrize("joins_decodes", [True, False])
@given(chunks=steps())
def test_every_query_attends_to_its_own_keys_once(joins_decodes: bool, chunks: list[Chunk]) -> None:
    calls = plan_calls(chunks, joins_decodes)
    found = {own.query: (own.num_queries, own.key, own.num_keys) for own in calls.own}
    if calls.decode is not None:
        for query, key, length in zip(
            calls.decode.queries, calls.decode.keys, calls.decode.lengths, strict=True
        ):
            assert query not in found
            found[query] = (1, key, length)
    expected, query = {}, 0
    for chunk in chunks:
        expected[query] = (chunk.num_tokens, chunk.slot - chunk.num_past, chunk.num_past + chunk.num_tokens)
        query += chunk.num_tokens
    assert found == expected
    assert joins_decodes is False or all(own.num_queries > 1 for own in calls.own)


@given(steps())
def test_a_prefix_is_attended_to_once_for_all_that_share_it(chunks: list[Chunk]) -> None:
    shared = [chunk for chunk in chunks if chunk.prefix is not None]
    calls = plan_calls(chunks, joins_decodes=False, min_shared_pairs=0).prefix
    assert len(calls) == len({id(chunk.prefix) for chunk in shared})
    assert sum(call.num_queries for call in calls) == sum(chunk.num_tokens for chunk in shared)


@given(steps(), st.integers(0, 12))
def test_few_decodes_on_a_prefix_attend_to_it_in_their_one_call(chunks: list[Chunk], fewest: int) -> None:
    calls = plan_calls(chunks, joins_decodes=True, min_shared_pairs=fewest)
    apart = {
        call.query + row: (call.key, call.num_keys)
        for call in calls.prefix
        for row in range(call.num_queries)
    }
    decode = calls.decode
    joined = {}
    if decode is not None:
        joined = {
            query: (key, length)
            for query, key, length in zip(
                decode.queries, decode.prefix_keys, decode.prefix_lengths, strict=True
            )
            if length
        }
    expected, query = {}, 0
    for chunk in chunks:
        for row in range(query, query + chunk.num_tokens):
            if chunk.prefix is not None:
                expected[row] = (chunk.prefix.span.start, chunk.prefix.length)
        query += chunk.num_tokens
    assert not apart.keys() & joined.keys()
    assert apart | joined == expected
    of_prefix = [
        [chunk for chunk in chunks if chunk.prefix is p] for p in {c.prefix for c in chunks} - {None}
    ]
    decodes = [group for group in of_prefix if all(chunk.num_tokens == 1 for chunk in group)]
    few = [g for g in decodes if len(g) < 4 or len(g) * g[0].prefix.length < fewest]
    assert len(joined) == sum(map(len, few))
