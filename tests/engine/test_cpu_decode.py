"""The CPU's decode kernel against attention written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from b2batch.engine.cpu_decode import decode_attention


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
