"""Attention over stretches of the arena as Triton kernels: decode, prefixes and ALiBi prefill.

A *tile* is some neighbouring queries against one contiguous stretch of keys. What a query sees follows
from positions alone, so the same kernel serves a chunk's own span (causal) and a shared prefix (all of
it lies before the query):

    key j of the stretch is seen  ⇔  first_position + j ≤ position of the query
    ALiBi bias                     =  slope · (first_position + j - position), float32

Each tile may be split over its keys. A query's *parts* (splits of its own span, splits of its prefix)
are merged by their log-sum-exp; a part that saw no key has -inf there and is not read.

Everything that changes from step to step is read from device memory, so launches can stand in a CUDA
graph. Needs triton; with TRITON_INTERPRET=1 the kernels run on a CPU, slowly, which is how they are tested.

Shapes: T tokens · P parts · Q query heads · K key heads · S arena tokens · D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from b2batch.engine.spans import TILE_FIELDS

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MIN_DOT = 16  # rows of the smallest matrix product a tensor core does


@dataclass(frozen=True, slots=True)
class Tiles:
    """One launch: tiles of at most ``num_rows`` queries each.

    ``table`` is (tiles, TILE_FIELDS) int64 on the device; a tile without queries is padding.
    """

    table: Tensor
    num_rows: int
    num_splits: int


@triton.jit
def _row_kernel(
    out_ptr, lse_ptr, query_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, slopes_ptr, scaling,
    out_row, out_part, out_head, lse_row, lse_part, query_row, query_head,
    keys_slot, keys_head, values_slot, values_head,
    FIRST_PART: tl.constexpr, GROUP: tl.constexpr, HAS_SLOPES: tl.constexpr, FIELDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """One query of one head: products as sums, since a matrix product of one row wastes its unit."""
    head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    fields = table_ptr + tile * FIELDS
    if tl.load(fields + 1) == 0:
        return
    row = tl.load(fields)
    first_slot = tl.load(fields + 2)
    first_position = tl.load(fields + 3).to(tl.int32)
    num_keys = tl.load(fields + 4).to(tl.int32)
    position = tl.load(positions_ptr + row).to(tl.int32)
    keys_per_split = tl.cdiv(tl.cdiv(num_keys, NUM_SPLITS), BLOCK_N) * BLOCK_N
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, tl.minimum(num_keys, position - first_position + 1))

    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    query = tl.load(query_ptr + row * query_row + head * query_head + d, mask=in_head, other=0.0)
    query = query.to(tl.float32) * (scaling * _LOG2_E)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head) * _LOG2_E
    keys_base = keys_ptr + first_slot * keys_slot + (head // GROUP) * keys_head
    values_base = values_ptr + first_slot * values_slot + (head // GROUP) * values_head
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = j < end
        mask = seen[:, None] & in_head[None, :]
        offset = j[:, None].to(tl.int64)
        keys = tl.load(keys_base + offset * keys_slot + d[None, :], mask=mask, other=0.0)
        values = tl.load(values_base + offset * values_slot + d[None, :], mask=mask, other=0.0)
        scores = tl.sum(query[None, :] * keys.to(tl.float32), axis=1)
        if HAS_SLOPES:
            scores += slope * (first_position + j - position).to(tl.float32)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_top)
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, axis=0)
        mean = mean * fade + tl.sum(weights[:, None] * values.to(tl.float32), axis=0)
        top = new_top
    is_empty = total == 0.0
    mean = mean / tl.where(is_empty, 1.0, total)
    lse = tl.where(is_empty, float("-inf"), (top + tl.log2(tl.where(is_empty, 1.0, total))) * _LN_2)
    part = FIRST_PART + split
    out = out_ptr + row * out_row + part * out_part + head * out_head + d
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=in_head)
    tl.store(lse_ptr + row * lse_row + part * lse_part + head, lse)


@triton.jit
def _tile_kernel(
    out_ptr, lse_ptr, query_ptr, keys_ptr, values_ptr, table_ptr, positions_ptr, slopes_ptr, scaling,
    out_row, out_part, out_head, lse_row, lse_part, query_row, query_head,
    keys_slot, keys_head, values_slot, values_head,
    FIRST_PART: tl.constexpr, GROUP: tl.constexpr, HAS_SLOPES: tl.constexpr, FIELDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Queries of one key head: BLOCK_M pairs of (query, head of the group), as matrix products."""
    key_head, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    fields = table_ptr + tile * FIELDS
    num_queries = tl.load(fields + 1).to(tl.int32)
    if num_queries == 0:
        return
    first_slot = tl.load(fields + 2)
    first_position = tl.load(fields + 3).to(tl.int32)
    num_keys = tl.load(fields + 4).to(tl.int32)
    m = tl.arange(0, BLOCK_M)
    is_query = m // GROUP < num_queries
    row = tl.load(fields) + m // GROUP
    head = key_head * GROUP + m % GROUP
    position = tl.load(positions_ptr + row, mask=is_query, other=0).to(tl.int32)
    keys_per_split = tl.cdiv(tl.cdiv(num_keys, NUM_SPLITS), BLOCK_N) * BLOCK_N
    begin = split * keys_per_split
    end = tl.minimum(begin + keys_per_split, tl.minimum(num_keys, tl.max(position) - first_position + 1))

    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    query = tl.load(
        query_ptr + row[:, None] * query_row + head[:, None] * query_head + d[None, :],
        mask=is_query[:, None] & in_head[None, :],
        other=0.0,
    )
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head, mask=is_query, other=0.0) * _LOG2_E
    keys_base = keys_ptr + first_slot * keys_slot + key_head * keys_head
    values_base = values_ptr + first_slot * values_slot + key_head * values_head
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        in_stretch = j < end
        mask = in_stretch[:, None] & in_head[None, :]
        offset = j[:, None].to(tl.int64)
        keys = tl.load(keys_base + offset * keys_slot + d[None, :], mask=mask, other=0.0)
        values = tl.load(values_base + offset * values_slot + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scaling * _LOG2_E)
        distance = first_position + j[None, :] - position[:, None]
        if HAS_SLOPES:
            scores += slope[:, None] * distance.to(tl.float32)
        scores = tl.where((distance <= 0) & in_stretch[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - finite_top[:, None])
        fade = tl.exp2(top - finite_top)
        total = total * fade + tl.sum(weights, axis=1)
        mean = mean * fade[:, None]
        mean = tl.dot(weights.to(values.dtype), values, mean, input_precision="ieee")
        top = new_top
    is_empty = total == 0.0
    mean = mean / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, float("-inf"), (top + tl.log2(tl.where(is_empty, 1.0, total))) * _LN_2)
    part = FIRST_PART + split
    out = out_ptr + row[:, None] * out_row + part * out_part + head[:, None] * out_head + d[None, :]
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=is_query[:, None] & in_head[None, :])
    tl.store(lse_ptr + row * lse_row + part * lse_part + head, lse, mask=is_query)


@triton.jit
def _merge_kernel(
    out_ptr, parts_ptr, lse_ptr, out_row, out_head, parts_row, parts_part, parts_head, lse_row, lse_part,
    NUM_PARTS: tl.constexpr, BLOCK_P: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One query of one head: its parts, weighted by what each holds of the softmax's denominator."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * lse_row + p * lse_part + head, mask=p < NUM_PARTS, other=float("-inf"))
    has_keys = lse != float("-inf")
    weights = tl.where(has_keys, tl.exp(lse - tl.max(lse, axis=0)), 0.0)
    parts = tl.load(
        parts_ptr + row * parts_row + p[:, None] * parts_part + head * parts_head + d[None, :],
        mask=has_keys[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    mean = tl.sum(weights[:, None] * parts.to(tl.float32), axis=0) / tl.sum(weights, axis=0)
    out = out_ptr + row * out_row + head * out_head + d
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)


def attend(
    query_TQD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    positions_T: Tensor,
    scaling: float,
    slopes_Q: Tensor | None,
    tiles: Tiles,
    out_TPQD: Tensor,
    lse_TPQ: Tensor,
    first_part: int = 0,
) -> None:
    """Fill parts [first_part, first_part + num_splits) of the tiles' queries; nothing else is written."""
    num_heads, head_dim = query_TQD.shape[1:]
    group = num_heads // keys_SKD.shape[1]
    block_m = row_block(tiles.num_rows, group)
    constants: dict[str, Any] = {
        "FIRST_PART": first_part,
        "GROUP": group,
        "HAS_SLOPES": slopes_Q is not None,
        "FIELDS": TILE_FIELDS,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(_MIN_DOT, triton.next_power_of_2(head_dim)),
        "NUM_SPLITS": tiles.num_splits,
    }
    if block_m == 1:
        kernel, num_programs = _row_kernel, num_heads
        constants |= {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    else:
        kernel, num_programs = _tile_kernel, keys_SKD.shape[1]
        constants |= {
            "BLOCK_M": block_m,
            "BLOCK_N": 64,
            "num_warps": 8 if block_m > 64 else 4,
            "num_stages": 3,
        }
    kernel[num_programs, len(tiles.table), tiles.num_splits](
        out_TPQD, lse_TPQ, query_TQD, keys_SKD, values_SKD, tiles.table, positions_T,
        lse_TPQ if slopes_Q is None else slopes_Q, scaling,
        *out_TPQD.stride()[:3], *lse_TPQ.stride()[:2], *query_TQD.stride()[:2],
        *keys_SKD.stride()[:2], *values_SKD.stride()[:2],
        **constants,
    )  # fmt: skip


def row_block(num_rows: int, group: int) -> int:
    """Rows of the matrix product for tiles of ``num_rows`` queries; 1 where no product is worth it."""
    pairs = num_rows * group
    return 1 if pairs == 1 else max(_MIN_DOT, triton.next_power_of_2(pairs))


def merge(parts_TPQD: Tensor, lse_TPQ: Tensor, out_TQD: Tensor) -> None:
    """Write the attention over all of a query's parts; each query must have seen a key in one of them."""
    num_tokens, num_parts, num_heads, head_dim = parts_TPQD.shape
    _merge_kernel[num_heads, num_tokens](
        out_TQD, parts_TPQD, lse_TPQ,
        *out_TQD.stride()[:2], *parts_TPQD.stride()[:3], *lse_TPQ.stride()[:2],
        NUM_PARTS=num_parts, BLOCK_P=triton.next_power_of_2(num_parts), HEAD_DIM=head_dim,
        BLOCK_D=max(_MIN_DOT, triton.next_power_of_2(head_dim)), num_warps=4,
    )  # fmt: skip
