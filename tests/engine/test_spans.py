from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.engine.graphs import Buckets
from b2batch.engine.spans import (
    TILE_FIELDS,
    StepRows,
    Stretch,
    buckets,
    num_tiles,
    prefix_capacity,
    tile_table,
)


def decode_rows(num_rows: int, groups: tuple[int, ...] = ()) -> StepRows:
    """Rows of sequences at 10 tokens each; the last ones on as many prefixes as there are groups."""
    own = [Stretch(i, 1, 100 + 10 * i, 0, 10) for i in range(num_rows)]
    prefixes = []
    first = num_rows - sum(groups)
    for place, size in enumerate(groups):
        prefixes.append(Stretch(first, size, 1000 * place, 0, 50))
        first += size
    slots = [s.key + 9 for s in own]
    return StepRows([5] * num_rows, [9] * num_rows, slots, own, prefixes, range(num_rows))


@given(most=st.integers(1, 1000))
def test_every_row_count_has_a_bucket_that_wastes_little(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for num_rows in range(1, most + 1):
        bucket = next(size for size in sizes if size >= num_rows)
        assert bucket - num_rows < max(8, num_rows / 2, 32 if num_rows > 128 else 0)


def test_there_are_few_graphs() -> None:
    assert len(buckets(256)) <= 20


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    num_rows=st.integers(1, 64),
    spare=st.integers(0, 5),
)
def test_tiles_cover_every_row_once(sizes: list[int], num_rows: int, spare: int) -> None:
    stretches = []
    first = 3
    for place, size in enumerate(sizes):
        stretches.append(Stretch(first, size, 1000 * place, place, 7 + place))
        first += size + 2
    count = num_tiles(stretches, num_rows)
    table = tile_table(stretches, num_rows, count + spare)
    tiles = [table[at : at + TILE_FIELDS] for at in range(0, len(table), TILE_FIELDS)]
    assert len(tiles) == count + spare
    seen = {}
    for query, num_queries, *keys in (tile[:5] for tile in tiles):
        assert num_queries <= num_rows
        for row in range(query, query + num_queries):
            assert row not in seen
            seen[row] = keys
    assert seen == {
        row: [s.key, s.first_position, s.num_keys]
        for s in stretches
        for row in range(s.query, s.query + s.num_queries)
    }


@pytest.mark.parametrize(
    ("num_rows", "groups"), [(3, ()), (3, (2,)), (100, (60,)), (100, (1,) * 80), (256, (128, 128))]
)
def test_there_is_room_for_the_prefixes(num_rows: int, groups: tuple[int, ...]) -> None:
    rows = decode_rows(num_rows, groups)
    step = Buckets(256, scratch_slot=9999).pad(rows)
    assert step.bucket >= num_rows
    assert (step.prefix_tiles == 0) == (not groups)
    assert num_tiles(rows.prefixes, 64) <= step.prefix_tiles <= step.bucket + 8


def test_few_prefixes_take_the_same_graph() -> None:
    shapes = {prefix_capacity(decode_rows(100, groups), 112) for groups in ((10,), (50, 50), (1, 2, 3))}
    assert len(shapes) == 1


def test_padding_stays_in_the_scratch_slot() -> None:
    rows = decode_rows(5, (2,))
    step = Buckets(64, scratch_slot=777).pad(rows)
    padded = step.rows
    assert step.bucket == padded.num_rows == 8
    assert list(padded.tokens[:5]) == list(rows.tokens)
    assert list(padded.own[:5]) == list(rows.own)
    assert list(padded.slots[5:]) == [777] * 3
    assert [(s.query, s.num_queries, s.key, s.num_keys) for s in padded.own[5:]] == [
        (i, 1, 777, 1) for i in range(5, 8)
    ]
    assert padded.prefixes == rows.prefixes


def test_only_whole_steps_of_decoding_count_as_such() -> None:
    assert decode_rows(4).is_decode
    prompt = StepRows([1, 2], [0, 1], [0, 1], [Stretch(0, 2, 0, 0, 2)], [], [1])
    assert not prompt.is_decode
    embedded = StepRows([1], [0], [0], [Stretch(0, 1, 0, 0, 1)], [], [])
    assert not embedded.is_decode
