"""The kernels against plain attention, on a CPU through Triton's interpreter and on a GPU for real."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from b2batch.engine.spans import TILE_FIELDS
from b2batch.engine.triton_attention import Tiles, attend, merge
from b2batch.models.baichuan import alibi_slopes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARENA = 700
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_key_heads: int
    head_dim: int
    alibi: bool = False

    @property
    def is_grouped(self) -> bool:
        return self.num_heads > self.num_key_heads


HEADS = (
    Heads(1, 1, 64),
    Heads(2, 2, 128, alibi=True),
    Heads(3, 3, 24, alibi=True),
    Heads(3, 1, 64),
    Heads(4, 2, 128, alibi=True),
)


@dataclass(frozen=True)
class Row:
    """A sequence whose newest ``num_queries`` tokens attend: to ``num_own`` keys, after a prefix."""

    num_queries: int
    num_own: int
    prefix: tuple[int, int] = (0, 0)  # its place in the arena, its tokens


class Case:
    """Random keys and values all over an arena, and rows that stand in it one behind the other."""

    def __init__(self, heads: Heads, dtype: torch.dtype, rows: list[Row], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.rows = rows
        self.keys = normal(ARENA, heads.num_key_heads, heads.head_dim)
        self.values = normal(ARENA, heads.num_key_heads, heads.head_dim)
        num_tokens = sum(row.num_queries for row in rows)
        self.queries = normal(num_tokens, heads.num_heads, heads.head_dim)
        slopes = torch.tensor(alibi_slopes(heads.num_heads), device=DEVICE) if heads.alibi else None
        self.slopes = slopes
        self.scaling = heads.head_dim**-0.5
        ends = list(itertools.accumulate(row.num_own for row in rows))
        self.own = [200 + end - row.num_own for end, row in zip(ends, rows, strict=True)]
        last = [row.prefix[1] + row.num_own for row in rows]
        self.positions = torch.tensor(
            [p for row, n in zip(rows, last, strict=True) for p in range(n - row.num_queries, n)],
            device=DEVICE,
        )

    def expected(self) -> Tensor:
        """Row by row, key by key, in float64."""
        parts = []
        first = 0
        for row, own in zip(self.rows, self.own, strict=True):
            place, length = row.prefix
            slots = [*range(place, place + length), *range(own, own + row.num_own)]
            group = self.queries.shape[1] // self.keys.shape[1]
            keys, values = (x[slots].double().repeat_interleave(group, 1) for x in (self.keys, self.values))
            queries = self.queries[first : first + row.num_queries].double()
            positions = self.positions[first : first + row.num_queries]
            distance = torch.arange(len(slots), device=DEVICE)[None, :] - positions[:, None]
            scores = torch.einsum("tqd,sqd->qts", queries, keys) * self.scaling
            if self.slopes is not None:
                scores += self.slopes.double()[:, None, None] * distance
            scores = scores.masked_fill(distance > 0, float("-inf"))
            parts.append(torch.einsum("qts,sqd->tqd", scores.softmax(-1), values))
            first += row.num_queries
        return torch.cat(parts)

    def own_tiles(self, num_rows: int, num_splits: int, only: range = range(1, ARENA)) -> Tiles:
        """Tiles over the rows' own spans, of those with as many queries as ``only`` has."""
        table = []
        first = 0
        for row, own in zip(self.rows, self.own, strict=True):
            for start in range(0, row.num_queries, num_rows):
                count = min(num_rows, row.num_queries - start)
                if row.num_queries in only:
                    table.append([first + start, count, own, row.prefix[1], row.num_own, 0, 0, 0])
            first += row.num_queries
        return Tiles(torch.tensor(table, device=DEVICE).view(-1, TILE_FIELDS), num_rows, num_splits)

    def prefix_tiles(self, num_rows: int, num_splits: int) -> Tiles:
        """Tiles over prefixes, neighbours on one prefix together; with padding between and behind."""
        table = [[0] * TILE_FIELDS]
        owners = [row.prefix for row in self.rows for _ in range(row.num_queries)]
        first = 0
        for (place, length), group in itertools.groupby(owners):
            count = len(list(group))
            table += [
                [first + start, min(num_rows, count - start), place, 0, length, 0, 0, 0]
                for start in range(0, count if length else 0, num_rows)
            ]
            first += count
        table.append([0] * TILE_FIELDS)
        return Tiles(torch.tensor(table, device=DEVICE), num_rows, num_splits)

    def parts(self, num_parts: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        tokens, heads, size = self.queries.shape
        out = torch.full((tokens, num_parts, heads, size), float("nan"), dtype=dtype, device=DEVICE)
        lse = torch.full((tokens, num_parts, heads), float("-inf"), device=DEVICE)
        return out, lse

    def run(self, tiles: Tiles, out: Tensor, lse: Tensor, first_part: int = 0) -> None:
        attend(
            self.queries,
            self.keys,
            self.values,
            self.positions,
            self.scaling,
            self.slopes,
            tiles,
            out,
            lse,
            first_part,
        )

    def merged(self, out: Tensor, lse: Tensor) -> Tensor:
        merged = torch.full_like(self.queries, float("nan"))
        merge(out, lse, merged)
        return merged

    def check(self, ours: Tensor) -> None:
        expected = self.expected()
        difference = (ours.double() - expected).abs().max() / expected.abs().max()
        assert difference < TOLERANCE[self.queries.dtype], difference


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_decoding_equals_plain_attention(heads: Heads, dtype: torch.dtype, num_splits: int) -> None:
    """Lengths on both sides of a block's end, and rows with fewer keys than splits."""
    if heads.is_grouped and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter has no matrix product in bfloat16")
    case = Case(heads, dtype, [Row(1, n) for n in (1, 3, 64, 65, 190)])
    out, lse = case.parts(num_splits)
    case.run(case.own_tiles(1, num_splits), out, lse)
    case.check(case.merged(out, lse))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("num_rows", [4, 16])
def test_chunks_of_a_prompt_are_causal_and_see_what_came_before(heads: Heads, num_rows: int) -> None:
    case = Case(heads, torch.float32, [Row(1, 1), Row(17, 17), Row(20, 70)])
    out, lse = case.parts(1)
    case.run(case.own_tiles(num_rows, 1), out, lse)
    case.check(out[:, 0])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_prefix_attended_once_merges_with_the_own_spans(heads: Heads, dtype: torch.dtype) -> None:
    """Decoding rows without a prefix, on one prefix, on another, and a chunk of a prompt on it."""
    prefixes = [(0, 0), (3, 70), (90, 101)]
    rows = [Row(1, 20), Row(1, 77)]
    rows += [Row(1, n, prefixes[1]) for n in (1, 30, 64, 9, 11)]
    rows += [Row(1, 5, prefixes[2]), Row(23, 40, prefixes[2])]
    case = Case(heads, dtype, rows)
    num_splits, prefix_splits = 2, 3
    out, lse = case.parts(num_splits + prefix_splits)
    case.run(case.own_tiles(1, num_splits, range(1, 2)), out, lse)
    case.run(case.own_tiles(16, 1, range(2, ARENA)), out, lse)
    case.run(case.prefix_tiles(4, prefix_splits), out, lse, first_part=num_splits)
    case.check(case.merged(out, lse))


@pytest.mark.parametrize("seed", range(4))
def test_any_rows_equal_plain_attention(seed: int) -> None:
    chance = random.Random(seed)
    rows = []
    while sum(row.num_own for row in rows) < 120:
        own = chance.randint(1, 90)
        rows.append(Row(chance.choice([1, 1, min(own, 9), own]), own, chance.choice([(0, 0), (11, 60)])))
    rows.sort(key=lambda row: row.prefix)
    case = Case(chance.choice(HEADS), chance.choice([torch.float32, torch.float16]), rows, seed)
    num_splits = chance.choice([1, 2, 8])
    out, lse = case.parts(num_splits + 1)
    case.run(case.own_tiles(chance.choice([8, 16]), num_splits), out, lse)
    case.run(case.prefix_tiles(chance.choice([4, 32]), 1), out, lse, first_part=num_splits)
    case.check(case.merged(out, lse))


def test_a_model_without_numbers_does_not_look_like_one_with() -> None:
    case = Case(HEADS[0], torch.float32, [Row(1, 20), Row(1, 30)])
    case.queries[1] = float("nan")
    out, lse = case.parts(2)
    case.run(case.own_tiles(1, 2), out, lse)
    merged = case.merged(out, lse)
    assert merged[0].isfinite().all()
    assert merged[1].isnan().all()


def test_heads_may_be_any_slice_of_the_fused_projection() -> None:
    """Queries come as a view into q, k and v side by side; nothing but the head's own axis is dense."""
    case = Case(HEADS[1], torch.float32, [Row(1, 33), Row(1, 90)])
    tokens, heads, size = case.queries.shape
    fused = torch.zeros(tokens, 3, heads, size, device=DEVICE)
    fused[:, 0] = case.queries
    case.queries = fused[:, 0]
    out, lse = case.parts(1)
    case.run(case.own_tiles(1, 1), out, lse)
    case.check(out[:, 0])
