"""The CPU's kernels against attention written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from b2batch.engine.cpu_attention import decode_attention, prefill_attention


def plain(
    query: Tensor, keys: Tensor, values: Tensor, slopes: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """One query (Q, D) against S keys, the last of them its own: out (Q, D), log-sum-exp (Q,)."""
    group = len(query) // keys.shape[1]
    query = query.double()
    keys, values = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
    scores = torch.einsum("qd,qsd->qs", query, keys) * scaling
    if slopes is not None:
        scores += slopes.double()[:, None] * torch.arange(1 - keys.shape[1], 1)
    return torch.einsum("qs,qsd->qd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (8, 8, 128), (4, 1, 16), (5, 5, 24)])
@pytest.mark.parametrize("alibi", [False, True])
def test_any_spans_equal_plain_attention(
    heads: int, key_heads: int, size: int, alibi: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(heads * size)
    keys, values = torch.randn(900, key_heads, size), torch.randn(900, key_heads, size)
    starts, lengths = [0, 700, 31, 200, 30], [1, 200, 2, 333, 100]
    shared_starts, shared_lengths = [0, 550, 0, 550, 899], [0, 120, 0, 120, 1]
    spans = np.array([starts, lengths, shared_starts, shared_lengths])
    query = 3 * torch.randn(len(starts), heads, size)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    out, lse = decode_attention(query, keys, values, spans, slopes, size**-0.5)
    for row, (start, length, shared_start, num_shared) in enumerate(spans.T):
        span = [*range(shared_start, shared_start + num_shared), *range(start, start + length)]
        expected = plain(query[row], keys[span], values[span], slopes, size**-0.5)
        torch.testing.assert_close(out[row].double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), expected[1], rtol=1e-5, atol=1e-5)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    keys = torch.zeros(3, 1, 16)
    keys[:, 0, 0] = torch.tensor([-1e4, 1e4, 1e4])
    values = torch.arange(3.0)[:, None, None].expand(3, 1, 16).contiguous()
    out, lse = decode_attention(torch.ones(1, 1, 16), keys, values, np.array([[0], [3], [0], [0]]), None, 1.0)
    torch.testing.assert_close(out, torch.full((1, 1, 16), 1.5))
    torch.testing.assert_close(lse, torch.tensor([[1e4 + np.log(2)]], dtype=torch.float32))


def test_what_is_no_number_stays_with_its_own_sequence() -> None:
    keys, values = torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    keys[5] = float("nan")
    out, lse = decode_attention(
        torch.randn(2, 2, 16), keys, values, np.array([[0, 10], [10, 10], [0, 0], [0, 0]]), None, 0.25
    )
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"), [(9, 3, 64), (8, 8, 128), (4, 1, 16), (5, 5, 24), (6, 3, 80), (15, 3, 32)]
)
@pytest.mark.parametrize("alibi", [False, True])
def test_any_chunks_equal_plain_attention(
    heads: int, key_heads: int, size: int, alibi: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(heads * size)
    keys, values = torch.randn(200, key_heads, size), torch.randn(200, key_heads, size)
    # first query, queries, first key, keys before: the last chunk ends with the arena
    chunks = np.array([[0, 1, 7, 0], [1, 2, 0, 5], [4, 13, 90, 0], [17, 6, 30, 57], [23, 9, 191, 0]])
    query = 3 * torch.randn(heads, 40, size).transpose(0, 1)
    slopes = 2.0 ** -torch.arange(1, heads + 1) if alibi else None
    out, lse = torch.full((40, heads, size), 7.0), torch.full((40, heads), 7.0)
    prefill_attention(query, keys, values, chunks, slopes, size**-0.5, out, lse)
    attended = set()
    for first, num_queries, start, num_past in chunks:
        for i in range(num_queries):
            span = slice(start, start + num_past + i + 1)
            expected = plain(query[first + i], keys[span], values[span], slopes, size**-0.5)
            torch.testing.assert_close(out[first + i].double(), expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[first + i].double(), expected[1], rtol=1e-5, atol=1e-5)
            attended.add(first + i)
    others = [row for row in range(40) if row not in attended]
    assert (out[others] == 7.0).all(), "rows of no chunk are somebody else's"


def test_what_is_no_number_stays_with_its_own_chunk() -> None:
    keys, values = torch.randn(20, 2, 16), torch.randn(20, 2, 16)
    keys[5], values[12:] = float("nan"), float("nan")
    out, lse = torch.empty(9, 2, 16), torch.empty(9, 2)
    chunks = np.array([[0, 6, 3, 0], [6, 3, 9, 0]])  # slots 3-8 and 9-11
    prefill_attention(torch.randn(9, 2, 16), keys, values, chunks, None, 0.25, out, lse)
    assert not out[2:6].isfinite().any()
    assert out[6:].isfinite().all()
    assert lse[6:].isfinite().all()


def test_scores_far_apart_in_a_chunk() -> None:
    keys = torch.zeros(3, 1, 16)
    keys[:, 0, 0] = torch.tensor([1e4, -1e4, 1e4])
    values = torch.arange(3.0)[:, None, None].expand(3, 1, 16).contiguous()
    out, lse = torch.empty(3, 1, 16), torch.empty(3, 1)
    prefill_attention(torch.ones(3, 1, 16), keys, values, np.array([[0, 3, 0, 0]]), None, 1.0, out, lse)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([0.0, 0.0, 1.0]))
    torch.testing.assert_close(lse[:, 0], torch.tensor([1e4, 1e4, 1e4 + np.log(2)], dtype=torch.float32))
