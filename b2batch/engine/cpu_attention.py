"""Attention on a CPU in float32: kernels that numba compiles, each for a head size.

    decode    one query of each sequence     its own span and, before it, one that it may share
    prefill   many queries of each sequence  its own span, causal

torch's kernel makes two matrix products a sequence and head. Where the query is one they read the keys
in pieces of one head and wait for memory; where the queries are a hundred they are too small for the
library that computes them. Here a decode reads a sequence's keys once, token by token, as they stand
(2-3 times as fast), and a prefill computes four queries against four keys at a time, up to the last
key that they see (1.2-1.9 times as fast at 50-250 queries).

Shapes: T queries of the step · B sequences · K key heads · G query heads of each · Q = K · G · S arena
tokens · D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from b2batch.engine.compiled import compiled

_LOG2_E, _LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
_ZERO, _HALF, _ONE, _THIRD = (np.float32(x) for x in (0.0, 0.5, 1.0, 1 / 3))
_QUARTER, _FIFTH, _SIXTH = (np.float32(x) for x in (1 / 4, 1 / 5, 1 / 6))
_LEAST_EXPONENT, _EXPONENT_BIAS, _MANTISSA_BITS = np.float32(-126), np.float32(127), np.int32(23)


@compiled
def _softmax(scores_S, num_keys, powers_S):  # type: ignore[no-untyped-def]
    """The first ``num_keys`` scores → their weights, the others → 0; returns the log-sum-exp.

    exp(x) = 2ⁿ · exp(r), |r| ≤ ln 2 / 2: a power of two made from its bits, and a polynomial. Both run in
    vectors, which the C library's exp does not, and are 1e-6 off at most. ``powers_S`` is room for the bits.
    """
    largest = scores_S[0]
    for s in range(1, num_keys):
        largest = max(largest, scores_S[s])
    for s in range(num_keys):
        x = max((scores_S[s] - largest) * _LOG2_E, _LEAST_EXPONENT)
        n = np.floor(x + _HALF)
        r = (x - n) * _LN_2
        powers_S[s] = np.int32(n + _EXPONENT_BIAS) << _MANTISSA_BITS
        tail = _ONE + r * _QUARTER * (_ONE + r * _FIFTH * (_ONE + r * _SIXTH))
        scores_S[s] = _ONE + r * (_ONE + r * _HALF * (_ONE + r * _THIRD * tail))
    powers = powers_S.view(np.float32)
    total = _ZERO
    for s in range(num_keys):
        scores_S[s] *= powers[s]
        total += scores_S[s]
    share = _ONE / total
    for s in range(num_keys):
        scores_S[s] *= share
    scores_S[num_keys:] = _ZERO
    return largest + np.float32(math.log(total))


@compiled
def _decode(q_BKGD, keys_SKD, values_SKD, spans_4B, slopes_KG, scaling, out_BKGD, lse_BKG):  # type: ignore[no-untyped-def]
    num_seqs, num_heads, num_grouped, size = q_BKGD.shape
    starts_B, lengths_B, shared_starts_B, shared_lengths_B = spans_4B
    longest = (lengths_B + shared_lengths_B).max()
    scores = np.empty((num_heads, num_grouped, longest), np.float32)
    powers = np.empty(longest, np.int32)
    for b in range(num_seqs):
        num_shared, shared_start = shared_lengths_B[b], shared_starts_B[b]
        own_start, length = starts_B[b] - num_shared, num_shared + lengths_B[b]
        for s in range(length):
            slot = s + (shared_start if s < num_shared else own_start)
            distance = np.float32(s - length + 1)
            for k in range(num_heads):
                for g in range(num_grouped):
                    product = _ZERO
                    for d in range(size):
                        product += q_BKGD[b, k, g, d] * keys_SKD[slot, k, d]
                    scores[k, g, s] = product * scaling + slopes_KG[k, g] * distance
        for k in range(num_heads):
            for g in range(num_grouped):
                lse_BKG[b, k, g] = _softmax(scores[k, g, :length], length, powers)
        out_BKGD[b] = _ZERO
        for s in range(length):
            slot = s + (shared_start if s < num_shared else own_start)
            for k in range(num_heads):
                for g in range(num_grouped):
                    weight = scores[k, g, s]
                    for d in range(size):
                        out_BKGD[b, k, g, d] += weight * values_SKD[slot, k, d]


@cache
def _prefill_kernel(size: int) -> Callable[..., Any]:
    """The kernel for heads of one size: as a constant it lets the innermost loops unroll (1.5-2 times)."""

    @compiled
    def prefill(q_TKGD, keys_SKD, values_SKD, chunks_N5, slopes_KG, scaling, out_TKGD, lse_TKG):  # type: ignore[no-untyped-def]
        num_grouped = q_TKGD.shape[2]
        longest = 4 + (chunks_N5[:, 1] + chunks_N5[:, 3]).max()
        scores, powers = np.empty((4, longest), np.float32), np.empty(longest, np.int32)
        q, out = np.empty((4, size), np.float32), np.empty((4, size), np.float32)
        q0, q1, q2, q3 = q[0], q[1], q[2], q[3]
        out0, out1, out2, out3 = out[0], out[1], out[2], out[3]
        for n in range(len(chunks_N5)):
            first, num_queries, start, num_past, k = chunks_N5[n]
            num_rows = num_queries * num_grouped
            for row in range(0, num_rows, 4):
                last_row = min(row + 4, num_rows) - 1  # computed again for those that four lack
                num_keys = num_past + last_row // num_grouped + 1
                last = start + num_keys - 1  # likewise, with scores and weights that count for nothing
                for i in range(4):
                    t, g = divmod(min(row + i, last_row), num_grouped)
                    for d in range(size):
                        q[i, d] = q_TKGD[first + t, k, g, d] * scaling

                for s in range(0, num_keys, 4):
                    slot = start + s
                    key0, key1 = keys_SKD[slot, k], keys_SKD[min(slot + 1, last), k]
                    key2, key3 = keys_SKD[min(slot + 2, last), k], keys_SKD[min(slot + 3, last), k]
                    x00 = x01 = x02 = x03 = x10 = x11 = x12 = x13 = _ZERO
                    x20 = x21 = x22 = x23 = x30 = x31 = x32 = x33 = _ZERO
                    for d in range(size):
                        x00 += q0[d] * key0[d]
                        x01 += q0[d] * key1[d]
                        x02 += q0[d] * key2[d]
                        x03 += q0[d] * key3[d]
                        x10 += q1[d] * key0[d]
                        x11 += q1[d] * key1[d]
                        x12 += q1[d] * key2[d]
                        x13 += q1[d] * key3[d]
                        x20 += q2[d] * key0[d]
                        x21 += q2[d] * key1[d]
                        x22 += q2[d] * key2[d]
                        x23 += q2[d] * key3[d]
                        x30 += q3[d] * key0[d]
                        x31 += q3[d] * key1[d]
                        x32 += q3[d] * key2[d]
                        x33 += q3[d] * key3[d]
                    scores[0, s], scores[0, s + 1], scores[0, s + 2], scores[0, s + 3] = x00, x01, x02, x03
                    scores[1, s], scores[1, s + 1], scores[1, s + 2], scores[1, s + 3] = x10, x11, x12, x13
                    scores[2, s], scores[2, s + 1], scores[2, s + 2], scores[2, s + 3] = x20, x21, x22, x23
                    scores[3, s], scores[3, s + 1], scores[3, s + 2], scores[3, s + 3] = x30, x31, x32, x33

                num_scores = (num_keys + 3) // 4 * 4
                for i in range(4):
                    t, g = divmod(min(row + i, last_row), num_grouped)
                    num_seen = num_past + t + 1
                    slope = slopes_KG[k, g]
                    if slope != _ZERO:
                        for s in range(num_seen):
                            scores[i, s] += slope * np.float32(s - num_seen + 1)
                    lse_TKG[first + t, k, g] = _softmax(scores[i, :num_scores], num_seen, powers)

                out[:] = _ZERO
                for s in range(0, num_keys, 4):
                    slot = start + s
                    value0, value1 = values_SKD[slot, k], values_SKD[min(slot + 1, last), k]
                    value2, value3 = values_SKD[min(slot + 2, last), k], values_SKD[min(slot + 3, last), k]
                    x00, x01, x02, x03 = scores[0, s], scores[0, s + 1], scores[0, s + 2], scores[0, s + 3]
                    x10, x11, x12, x13 = scores[1, s], scores[1, s + 1], scores[1, s + 2], scores[1, s + 3]
                    x20, x21, x22, x23 = scores[2, s], scores[2, s + 1], scores[2, s + 2], scores[2, s + 3]
                    x30, x31, x32, x33 = scores[3, s], scores[3, s + 1], scores[3, s + 2], scores[3, s + 3]
                    for d in range(size):
                        v0, v1, v2, v3 = value0[d], value1[d], value2[d], value3[d]
                        out0[d] += x00 * v0 + x01 * v1 + x02 * v2 + x03 * v3
                        out1[d] += x10 * v0 + x11 * v1 + x12 * v2 + x13 * v3
                        out2[d] += x20 * v0 + x21 * v1 + x22 * v2 + x23 * v3
                        out3[d] += x30 * v0 + x31 * v1 + x32 * v2 + x33 * v3
                for i in range(last_row - row + 1):
                    t, g = divmod(row + i, num_grouped)
                    out_TKGD[first + t, k, g] = out[i]

    return prefill


def computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels are for keys and values there, in that dtype."""
    return device.type == "cpu" and dtype == torch.float32


def decode_attention(
    query_BQD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    spans_4B: NDArray[np.int64],
    slopes: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Each query against the keys of a shared span and then of its own, the last of them its token's.

    ``spans_4B``: start and length of the own spans, start and length of the shared ones, 0 where there
    is none. The rest is float32 and contiguous; ``slopes`` (Q,) are ALiBi's. Returns out (B, Q, D) and
    the log-sum-exp of the scores (B, Q).
    """
    num_seqs, num_queries, _ = query_BQD.shape
    out_BQD, lse_BQ = torch.empty_like(query_BQD), query_BQD.new_empty(num_seqs, num_queries)
    q, out, lse, slopes_KG = _grouped(keys_SKD.shape[1], query_BQD, out_BQD, lse_BQ, slopes)
    keys, values = keys_SKD.numpy(), values_SKD.numpy()

    def run(rows: slice) -> None:
        _decode(
            q[rows], keys, values, spans_4B[:, rows], slopes_KG, np.float32(scaling), out[rows], lse[rows]
        )

    _split(run, num_seqs)
    return out_BQD, lse_BQ


def prefill_attention(
    query_TQD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    chunks_N4: NDArray[np.int64],
    slopes: Tensor | None,
    scaling: float,
    out_TQD: Tensor,
    lse_TQ: Tensor,
) -> None:
    """Causal attention of chunks of queries to their spans, into ``out_TQD`` and the log-sum-exp ``lse_TQ``.

    ``chunks_N4``: first query, number of queries, first key, and number of keys before the first
    query's. All is float32; keys, values and results are contiguous. ``slopes`` (Q,) are ALiBi's.
    """
    num_heads = keys_SKD.shape[1]
    q, out, lse, slopes_KG = _grouped(num_heads, query_TQD, out_TQD, lse_TQ, slopes)
    keys, values = keys_SKD.numpy(), values_SKD.numpy()
    heads = np.tile(np.arange(num_heads), len(chunks_N4))[:, None]
    chunks_N5 = np.concatenate((np.repeat(chunks_N4, num_heads, 0), heads), axis=1)
    kernel = _prefill_kernel(keys_SKD.shape[2])

    def run(rows: slice) -> None:
        kernel(q, keys, values, chunks_N5[rows], slopes_KG, np.float32(scaling), out, lse)

    _split(run, len(chunks_N5))


def _grouped(
    num_heads: int, query: Tensor, out: Tensor, lse: Tensor, slopes: Tensor | None
) -> tuple[NDArray[np.float32], ...]:
    """The arrays with the Q heads as K groups of G; without ALiBi the slopes are 0."""
    num_queries, num_query_heads, size = query.shape
    heads = (num_heads, num_query_heads // num_heads)
    slopes = query.new_zeros(num_query_heads) if slopes is None else slopes
    return (
        query.contiguous().view(num_queries, *heads, size).numpy(),
        out.view(num_queries, *heads, size).numpy(),
        lse.view(num_queries, *heads).numpy(),
        slopes.view(heads).numpy(),
    )


def _split(run: Callable[[slice], None], num_rows: int) -> None:
    """``run`` over all rows, on as many threads as torch has."""
    num_threads = min(torch.get_num_threads(), num_rows)
    if num_threads == 1:
        run(slice(None))
    else:
        list(_threads(num_threads).map(run, (slice(i, None, num_threads) for i in range(num_threads))))


@cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="attention")


def compile_kernels(head_size: int) -> None:
    """Have the kernels compiled, some four seconds the first time, before there is work that would wait."""
    token, lse = torch.zeros(1, 1, head_size), torch.zeros(1, 1)
    decode_attention(token, token, token, np.array([[0], [1], [0], [0]]), None, 1.0)
    prefill_attention(token, token, token, np.array([[0, 1, 0, 0]]), None, 1.0, token.clone(), lse)
