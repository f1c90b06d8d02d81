"""A step as rows and stretches of keys, for devices that want it in few tensors. Ints only, no tensors.

    rows       one a token: its id, its position, the slot its key and value go to
    stretch    neighbouring rows and one contiguous run of keys that they attend to
    tile       a piece of a stretch with at most so many rows: what one program of a kernel works on

A step of decoding can be padded to a fixed number of rows: each further row attends to one scratch slot
that belongs to nobody, and changes nothing for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

TILE_FIELDS = 8  # query, num_queries, key, first_position, num_keys, then zeros up to 64 bytes
_BUSY_PROGRAMS = 528  # four for each of a large GPU's 132 processors
_MOST_SPLITS = 16
_SMALL_STEP, _MIDDLE_STEP, _LARGE_STEP = 8, 16, 32


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows [query, query + num_queries) against the keys in slots [key, key + num_keys).

    ``first_position`` is the position, in its sequence, of the first of these keys; a row sees the keys
    up to its own position.
    """

    query: int
    num_queries: int
    key: int
    first_position: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class StepRows:
    """Everything of a step that the device must know. ``own`` covers every row once, in order.

    ``wanted`` are the rows whose logits are wanted.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    own: Sequence[Stretch]
    prefixes: Sequence[Stretch]
    wanted: Sequence[int]

    @property
    def num_rows(self) -> int:
        return len(self.tokens)

    @property
    def is_decode(self) -> bool:
        """Whether every row is one sequence's newest token, and all their logits are wanted."""
        return len(self.own) == self.num_rows == len(self.wanted)


def pad_rows(rows: StepRows, num_rows: int, scratch_slot: int) -> StepRows:
    """A step of decoding with rows behind its own up to ``num_rows``; their logits mean nothing."""
    first, more = rows.num_rows, num_rows - rows.num_rows
    return replace(
        rows,
        tokens=[*rows.tokens, *[0] * more],
        positions=[*rows.positions, *[0] * more],
        slots=[*rows.slots, *[scratch_slot] * more],
        own=[*rows.own, *(Stretch(first + i, 1, scratch_slot, 0, 1) for i in range(more))],
        wanted=range(num_rows),
    )


def tile_table(stretches: Sequence[Stretch], num_rows: int, num_tiles: int | None = None) -> list[int]:
    """The stretches cut into tiles of at most ``num_rows`` rows, TILE_FIELDS ints each.

    With ``num_tiles``, tiles without rows fill the table up to that many.
    """
    padding = [0] * (TILE_FIELDS - 5)
    table: list[int] = []
    for s in stretches:
        for start in range(0, s.num_queries, num_rows):
            count = min(num_rows, s.num_queries - start)
            table += [s.query + start, count, s.key, s.first_position, s.num_keys, *padding]
    if num_tiles is not None:
        table += [0] * (num_tiles * TILE_FIELDS - len(table))
    return table


def num_tiles(stretches: Sequence[Stretch], num_rows: int) -> int:
    """How many tiles of at most ``num_rows`` rows the stretches make."""
    return sum(math.ceil(s.num_queries / num_rows) for s in stretches)


def choose_splits(num_programs: int) -> int:
    """Into how many parts to split each tile's keys so that a GPU has enough to do; a power of two."""
    splits = 1
    while splits < _MOST_SPLITS and splits * num_programs < _BUSY_PROGRAMS:
        splits *= 2
    return splits


def prefix_tile_rows(num_rows: int) -> int:
    """Rows of a tile where ``num_rows`` rows may share a prefix: a power of two from 16 to 64."""
    return min(64, max(16, 1 << (num_rows - 1).bit_length()))


def buckets(max_num_rows: int) -> list[int]:
    """Row counts that decode steps are padded to: at most 8, 16 or 32 rows, or a quarter, are idle."""
    sizes = [1, 2, 4]
    for step, top in ((_SMALL_STEP, 64), (_MIDDLE_STEP, 128), (_LARGE_STEP, max_num_rows + _LARGE_STEP)):
        sizes += range(sizes[-1] // step * step + step, top + 1, step)
    kept = [size for size in sizes if size < max_num_rows]
    return [*kept, max_num_rows]


def prefix_capacity(rows: StepRows, bucket: int) -> int:
    """Tiles to keep room for: none, a few groups, or a group for each row. Few choices, few graphs."""
    if not rows.prefixes:
        return 0
    per_tile = prefix_tile_rows(bucket)
    few = math.ceil(bucket / per_tile) + 4
    return few if num_tiles(rows.prefixes, per_tile) <= few else bucket
