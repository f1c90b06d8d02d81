"""Attention of decoding on a CPU: one query of each sequence against its keys in the arena.

torch's kernel makes two small matrix products a sequence and head, each of which reads the keys in
pieces of one head; nearly all of its time is spent waiting for memory. Here a sequence's keys are
read once, token by token, as they stand: 2-3 times as fast, for any spans of any length. A sequence
has its own span and, before it, one that it may share.

Shapes: B sequences · K key heads · G query heads of each · S arena tokens · D head size.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


# Sums may be taken in any order, so that they run in vectors; what is no number must stay none.
@numba.njit(fastmath={"reassoc", "contract", "arcp", "nsz"}, nogil=True, error_model="numpy")
def _decode(q_BKGD, keys_SKD, values_SKD, spans_4B, slopes_KG, scaling, out_BKGD, lse_BKG):  # type: ignore[no-untyped-def]
    num_seqs, num_heads, num_grouped, size = q_BKGD.shape
    starts_B, lengths_B, shared_starts_B, shared_lengths_B = spans_4B
    scores = np.empty((num_heads, num_grouped, (lengths_B + shared_lengths_B).max()), np.float32)
    for b in range(num_seqs):
        num_shared, shared_start = shared_lengths_B[b], shared_starts_B[b]
        own_start, length = starts_B[b] - num_shared, num_shared + lengths_B[b]
        for s in range(length):
            slot = s + (shared_start if s < num_shared else own_start)
            distance = np.float32(s - length + 1)
            for k in range(num_heads):
                for g in range(num_grouped):
                    product = np.float32(0.0)
                    for d in range(size):
                        product += q_BKGD[b, k, g, d] * keys_SKD[slot, k, d]
                    scores[k, g, s] = product * scaling + slopes_KG[k, g] * distance
        for k in range(num_heads):
            for g in range(num_grouped):
                largest = scores[k, g, 0]
                for s in range(1, length):
                    largest = max(largest, scores[k, g, s])
                total = np.float32(0.0)
                for s in range(length):
                    weight = np.float32(math.exp(scores[k, g, s] - largest))
                    scores[k, g, s] = weight
                    total += weight
                lse_BKG[b, k, g] = largest + np.float32(math.log(total))
                for s in range(length):
                    scores[k, g, s] /= total
        out_BKGD[b] = 0.0
        for s in range(length):
            slot = s + (shared_start if s < num_shared else own_start)
            for k in range(num_heads):
                for g in range(num_grouped):
                    weight = scores[k, g, s]
                    for d in range(size):
                        out_BKGD[b, k, g, d] += weight * values_SKD[slot, k, d]


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
    num_seqs, num_queries, size = query_BQD.shape
    num_heads = keys_SKD.shape[1]
    grouped = (num_seqs, num_heads, num_queries // num_heads, size)
    out_BQD, lse_BQ = torch.empty_like(query_BQD), query_BQD.new_empty(num_seqs, num_queries)
    slopes_Q = query_BQD.new_zeros(num_queries) if slopes is None else slopes
    q, out, lse = (
        query_BQD.view(grouped).numpy(),
        out_BQD.view(grouped).numpy(),
        lse_BQ.view(grouped[:3]).numpy(),
    )
    keys, values, slopes_KG = keys_SKD.numpy(), values_SKD.numpy(), slopes_Q.view(grouped[1:3]).numpy()

    def run(rows: slice) -> None:
        _decode(
            q[rows], keys, values, spans_4B[:, rows], slopes_KG, np.float32(scaling), out[rows], lse[rows]
        )

    num_threads = min(torch.get_num_threads(), num_seqs)
    if num_threads == 1:
        run(slice(None))
    else:
        list(_threads(num_threads).map(run, (slice(i, None, num_threads) for i in range(num_threads))))
    return out_BQD, lse_BQ


def compile_kernel() -> None:
    """Have the kernel compiled, some two seconds, before there is work that would wait for it."""
    token = torch.zeros(1, 1, 1)
    decode_attention(token, token, token, np.array([[0], [1], [0], [0]]), None, 1.0)


@cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
