"""Which keys a step's queries attend to, as few calls as pay. Ints only.

chunk of many queries    its own span, causal                       a call each
chunk of one query       its own span; spans of one size class
                         stand evenly spaced, so that neighbours
                         are read through one strided view          a call for several
chunks on one prefix     the prefix, dense                          a call for all
"""

from __future__ import annotations

from collections import defaultdict
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
    """One query each of several sequences against spans that begin ``stride`` tokens apart.

    Row i of the call reads ``num_keys`` keys from ``key + i * stride`` on and minds the first
    ``lengths[i]`` of them; ``queries[i]`` is its row in the step. Rows of no sequence (length 0)
    fill the gaps; what comes out of them is dropped.
    """

    queries: tuple[int, ...]
    lengths: tuple[int, ...]
    key: int
    stride: int

    @property
    def num_keys(self) -> int:
        return max(self.lengths)


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
    decode: tuple[DecodeCall, ...]
    prefix: tuple[PrefixCall, ...]


def plan_calls(chunks: Sequence[Chunk], padding_tokens: int | None = None) -> Calls:
    """The attention calls of a step.

    Chunks of one query are read together while each new one adds at most ``padding_tokens`` keys
    that nobody needs: about what a call of its own would cost. None: every chunk has its own call.
    """
    own: list[OwnCall] = []
    decodes: dict[tuple[int, int], list[OwnCall]] = defaultdict(list)
    row = 0
    for chunk in chunks:
        call = OwnCall(row, chunk.num_tokens, chunk.slot - chunk.num_past, chunk.num_past)
        span = chunk.owner.span
        if padding_tokens is None or chunk.num_tokens > 1 or span is None:
            own.append(call)
        else:
            decodes[span.size, span.start % span.size].append(call)
        row += chunk.num_tokens
    decode: list[DecodeCall] = []
    for (stride, _), calls in decodes.items():
        calls.sort(key=lambda call: call.key)
        decode += _group(calls, stride, padding_tokens or 0)
    return Calls(tuple(own), tuple(decode), tuple(_prefix_calls(chunks)))


def _group(calls: Sequence[OwnCall], stride: int, padding_tokens: int) -> list[DecodeCall]:
    """Neighbours in the arena, joined while the padding of the next one stays within bounds."""
    groups: list[list[OwnCall]] = []
    padding = num_rows = num_keys = used = 0
    for call in calls:
        gap = (call.key - groups[-1][-1].key) // stride if groups else 0
        joined_keys = max(num_keys, call.num_keys)
        joined_padding = (num_rows + gap) * joined_keys - used - call.num_keys
        if groups and joined_padding - padding <= padding_tokens:
            groups[-1].append(call)
            num_rows, num_keys, used, padding = (
                num_rows + gap,
                joined_keys,
                used + call.num_keys,
                joined_padding,
            )
        else:
            groups.append([call])
            num_rows, num_keys, used, padding = 1, call.num_keys, call.num_keys, 0
    return [_decode_call(group, stride) for group in groups]


def _decode_call(group: Sequence[OwnCall], stride: int) -> DecodeCall:
    first = group[0].key
    num_rows = (group[-1].key - first) // stride + 1
    queries, lengths = [group[0].query] * num_rows, [0] * num_rows
    for call in group:
        index = (call.key - first) // stride
        queries[index], lengths[index] = call.query, call.num_keys
    return DecodeCall(tuple(queries), tuple(lengths), first, stride)


def _prefix_calls(chunks: Sequence[Chunk]) -> list[PrefixCall]:
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
    return calls
