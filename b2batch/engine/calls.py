"""Which keys a step's queries attend to, as few calls as pay. Ints only.

chunk of many queries    its own span, causal      a call each
chunk of one query       its own span              a call for all, where the device has one for it
chunks on one prefix     the prefix, dense         a call for all; where few, in the call for all decodes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from b2batch.engine.scheduler import Chunk

# Measured on a CPU with 4-40 heads of 64 and 128, with and without ALiBi.
MIN_SHARED_PAIRS = 1000
_MIN_SHARERS = 4


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
    """One query each of several sequences: ``queries[i]`` against ``lengths[i]`` keys from ``keys[i]`` on.

    Before them ``prefix_lengths[i]`` keys from ``prefix_keys[i]`` on; none where a ``PrefixCall`` does it.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    lengths: tuple[int, ...]
    prefix_keys: tuple[int, ...]
    prefix_lengths: tuple[int, ...]


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


def plan_calls(
    chunks: Sequence[Chunk], joins_decodes: bool, min_shared_pairs: int = MIN_SHARED_PAIRS
) -> Calls:
    """The attention calls of a step.

    Args:
        joins_decodes: whether the device has a call for all chunks of one query.
        min_shared_pairs: decodes on a prefix with fewer pairs of a query and a key than this attend to
            it in that call: one of its own would cost more than it saves. Up to three always do.
    """
    own: list[OwnCall] = []
    decodes: list[tuple[int, ...]] = []
    prefixes: list[PrefixCall] = []
    row = 0
    for prefix, group in groupby(chunks, key=lambda chunk: chunk.prefix):
        stretch = list(group)
        shared = (0, 0) if prefix is None else (prefix.span.start, prefix.length)
        num_queries = sum(chunk.num_tokens for chunk in stretch)
        is_few = len(stretch) < _MIN_SHARERS or num_queries * shared[1] < min_shared_pairs
        joins = joins_decodes and is_few and num_queries == len(stretch)  # decodes, all of them
        if prefix is not None and not joins:
            prefixes.append(PrefixCall(row, num_queries, *shared))
            shared = (0, 0)
        for chunk in stretch:
            key = chunk.slot - chunk.num_past
            if joins_decodes and chunk.num_tokens == 1:
                decodes.append((row, key, chunk.num_past + 1, *shared))
            else:
                own.append(OwnCall(row, chunk.num_tokens, key, chunk.num_past))
            row += chunk.num_tokens
    decode = DecodeCall(*zip(*decodes, strict=True)) if decodes else None
    return Calls(tuple(own), decode, tuple(prefixes))
