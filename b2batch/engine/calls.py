"""Which keys a step's queries attend to, as few calls as pay. Ints only.

chunk of many queries    its own span, causal      a call each
chunk of one query       its own span              a call for all, where the device has one for it
chunks on one prefix     the prefix, dense         a call for all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from b2batch.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class OwnCall:
    """A chunk's queries [query, query + num_queries) against its own span's keys from ``key`` on."""

    query: int
    num_queries: int
    key: int
    num_past: int

    @property
    def num_keys(self) -> int:
        return self.num_past + self.num_queries


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """One query each of several sequences: ``queries[i]`` against ``lengths[i]`` keys from ``keys[i]`` on."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefixCall:
    """Queries [query, query + num_queries) of neighbouring chunks against one shared prefix."""

    query: int
    num_queries: int
    key: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class Calls:
    """All attention calls of a step; the same for every layer."""

    own: tuple[OwnCall, ...]
    decode: DecodeCall | None
    prefix: tuple[PrefixCall, ...]


def plan_calls(chunks: Sequence[Chunk], joins_decodes: bool) -> Calls:
    """The attention calls of a step; ``joins_decodes`` makes one call of all chunks of one query."""
    own: list[OwnCall] = []
    row = 0
    for chunk in chunks:
        own.append(OwnCall(row, chunk.num_tokens, chunk.slot - chunk.num_past, chunk.num_past))
        row += chunk.num_tokens
    decodes = [call for call in own if call.num_queries == 1] if joins_decodes else []
    if not decodes:
        return Calls(tuple(own), None, _prefix_calls(chunks))
    joined = DecodeCall(
        tuple(call.query for call in decodes),
        tuple(call.key for call in decodes),
        tuple(call.num_keys for call in decodes),
    )
    return Calls(tuple(call for call in own if call.num_queries > 1), joined, _prefix_calls(chunks))


def _prefix_calls(chunks: Sequence[Chunk]) -> tuple[PrefixCall, ...]:
    """Neighbouring chunks on the same prefix become one call."""
    calls: list[PrefixCall] = []
    row = 0
    previous = None
    for chunk in chunks:
        prefix = chunk.prefix
        if prefix is not None:
            first, num_queries = row, chunk.num_tokens
            if prefix is previous:
                before = calls.pop()
                first, num_queries = before.query, before.num_queries + num_queries
            calls.append(PrefixCall(first, num_queries, prefix.span.start, prefix.length))
        previous = prefix
        row += chunk.num_tokens
    return tuple(calls)
