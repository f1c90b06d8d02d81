"""Attention over the arena: the function that transformers' attention interface calls, in every layer.

A step runs as one packed row of tokens of many sequences. Each chunk of it attends to up to two
stretches of keys, and the two results are merged by their log-sum-exp:

    own span   |--- past ---|-- chunk --|      causal
    prefix     |------------------------|      dense, once for all chunks that share it

Keys and values of the whole step are written before anything attends, so a prefix may be computed
in the very step that first uses it.

Shapes: T tokens of the step · B sequences of the decode call · Q query heads · K key heads · G = Q / K ·
S keys · D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from b2batch.engine.calls import Calls, DecodeCall, OwnCall, PrefixCall
from b2batch.engine.cpu_attention import computes, decode_attention, prefill_attention

ATTENTION_NAME = "b2batch"

_NARROW = 256  # queries up to which the heads of a group ride along the query axis in a prefix call


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the attention function must know of the step and cannot be passed through the model.

    ``slots`` (T,) says where each token's key and value go; rows behind the last of them are padding.
    ``positions`` (T,) is a token's position in its sequence; ``caches`` is (keys, values) of each
    layer, each (arena tokens, K, D). Without ``calls`` keys and values are written, and nothing more
    (``KeysWritten``). What a call needs in tensors is made by the first layer and kept for the others.
    """

    slots: Tensor
    positions: Tensor
    calls: Calls | None
    caches: Sequence[tuple[Tensor, Tensor]]
    _made: dict[object, Any] = field(default_factory=dict)

    def once(self, key: object, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for ``key`` the first time in this step."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class KeysWritten(Exception):
    """A layer's keys and values stand in the arena, and that was all that the step wanted of it."""


_current: ContextVar[Mapping[torch.device, StepContext]] = ContextVar("b2batch_step")


@contextmanager
def step_contexts(contexts: Mapping[torch.device, StepContext]) -> Iterator[None]:
    """Let each layer see its device's context; some models drop keyword arguments on the way."""
    token = _current.set(contexts)
    try:
        yield
    finally:
        _current.reset(token)


def arena_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """(1, Q, T, D) queries and (1, K, T, D) new keys and values → (1, T, Q, D)."""
    step = _current.get()[query.device]
    keys_SKD, values_SKD = step.caches[cast(int, module.layer_idx)]
    write_keys(keys_SKD, values_SKD, step.slots, key, value)
    if step.calls is None:
        raise KeysWritten
    layer = _Layer(step, keys_SKD, values_SKD, scaling, getattr(module, "alibi_slopes", None))
    query_TQD = query[0].transpose(0, 1).to(keys_SKD.dtype)
    out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
    out_TQD[len(step.slots) :] = 0
    lse_TQ = query_TQD.new_empty(query_TQD.shape[:2], dtype=torch.float32)
    if step.calls.own:
        layer.attend_own(step.calls.own, query_TQD, out_TQD, lse_TQ)
    if step.calls.decode is not None:
        layer.attend_decode(step.calls.decode, query_TQD, out_TQD, lse_TQ)
    for prefix in step.calls.prefix:
        rows = slice(prefix.query, prefix.query + prefix.num_queries)
        out, lse = layer.attend_prefix(prefix, query_TQD[rows])
        _merge_into(out_TQD[rows], lse_TQ[rows], out, lse)
    return out_TQD[None].to(query.dtype), None


def write_keys(keys_SKD: Tensor, values_SKD: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Put a step's new keys and values, (1, K, T, D), into a layer's arena; behind the slots is padding."""
    for arena_SKD, new in ((keys_SKD, key), (values_SKD, value)):
        arena_SKD.index_copy_(0, slots, new[0, :, : len(slots)].transpose(0, 1).to(arena_SKD.dtype))


@dataclass(frozen=True, slots=True)
class _Spans:
    """A decode call in arrays."""

    queries: Tensor
    spans: NDArray[np.int64]

    @classmethod
    def of(cls, call: DecodeCall) -> _Spans:
        spans = np.array([call.keys, call.lengths, call.prefix_keys, call.prefix_lengths])
        return cls(torch.tensor(call.queries), spans)


def _chunk_array(calls: tuple[OwnCall, ...]) -> NDArray[np.int64]:
    return np.array([(call.query, call.num_queries, call.key, call.num_past) for call in calls])


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's keys and values, both (arena tokens, K, D), and how scores are made of them."""

    step: StepContext
    keys: Tensor
    values: Tensor
    scaling: float
    slopes: Tensor | None

    def attend_own(
        self, calls: tuple[OwnCall, ...], query_TQD: Tensor, out_TQD: Tensor, lse_TQ: Tensor
    ) -> None:
        """Causal attention of chunks to their spans."""
        if computes(self.keys.device, self.keys.dtype):
            chunks = self.step.once(calls, lambda: _chunk_array(calls))
            prefill_attention(
                query_TQD, self.keys, self.values, chunks, self.slopes, self.scaling, out_TQD, lse_TQ
            )
            return
        for call in calls:
            rows = slice(call.query, call.query + call.num_queries)
            out_TQD[rows], lse_TQ[rows] = self._attend_chunk(call, query_TQD[rows])

    def _attend_chunk(self, call: OwnCall, query_TQD: Tensor) -> tuple[Tensor, Tensor]:
        """Causal attention of the newest T tokens of a span to all S of it: out (T, Q, D), lse (T, Q)."""
        span = slice(call.key, call.key + call.num_keys)
        is_causal = call.num_queries > 1
        bias: Tensor | None = None
        if self.slopes is not None or (is_causal and call.num_past):
            bias = self.step.once(call, lambda: self._causal_bias(call))
            is_causal = False
        out, lse = self._attend(
            query_TQD[None], self.keys[None, span], self.values[None, span], bias, is_causal
        )
        return out[0], lse[0]

    def _causal_bias(self, call: OwnCall) -> Tensor:
        """slope·(j - i) where j ≤ i and -inf elsewhere, (1, 1 or Q, T, S) float32; slope 0 without ALiBi."""
        device = self.keys.device
        queries = torch.arange(call.num_past, call.num_keys, device=device)
        distance = torch.arange(call.num_keys, device=device)[None, :] - queries[:, None]
        bias = torch.zeros_like(distance, dtype=torch.float32)[None, None]
        if self.slopes is not None:
            bias = self.slopes[None, :, None, None] * distance
        return bias.masked_fill(distance > 0, float("-inf"))

    def attend_decode(self, call: DecodeCall, query_TQD: Tensor, out_TQD: Tensor, lse_TQ: Tensor) -> None:
        """One query each of B sequences against their spans."""
        spans = self.step.once(call, lambda: _Spans.of(call))
        query_BQD = query_TQD.index_select(0, spans.queries)
        out_BQD, lse_BQ = decode_attention(
            query_BQD, self.keys, self.values, spans.spans, self.slopes, self.scaling
        )
        out_TQD.index_copy_(0, spans.queries, out_BQD)
        lse_TQ.index_copy_(0, spans.queries, lse_BQ)

    def attend_prefix(self, call: PrefixCall, query_TQD: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of T queries, all of them after the prefix, to its S keys: out (T, Q, D), lse (T, Q).

        The ALiBi bias slope·(j - i) is slope·(j - S), the same for every query, plus slope·(S - i),
        which is the same for every key: the second part only shifts the log-sum-exp.
        """
        span = slice(call.key, call.key + call.num_keys)
        keys_SKD, values_SKD = self.keys[span], self.values[span]
        if self.slopes is None:
            if len(query_TQD) <= _NARROW:
                return self._attend_grouped(query_TQD, keys_SKD, values_SKD)
            out, lse = self._attend(query_TQD[None], keys_SKD[None], values_SKD[None], None, is_causal=False)
            return out[0], lse[0]
        slopes = self.slopes
        to_end = torch.arange(-call.num_keys, 0, device=slopes.device)
        bias = (slopes[:, None] * to_end)[None, :, None, :]
        out, lse = self._attend(query_TQD[None], keys_SKD[None], values_SKD[None], bias, is_causal=False)
        positions = self.step.positions[call.query : call.query + call.num_queries]
        return out[0], lse[0] + slopes[None, :] * (call.num_keys - positions)[:, None]

    def _attend_grouped(
        self, query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Dense attention whose query heads of a group ride along the query axis: larger products."""
        num_queries, num_heads, size = query_TQD.shape
        num_groups = keys_SKD.shape[1]
        if num_groups == num_heads:
            out, lse = self._attend(query_TQD[None], keys_SKD[None], values_SKD[None], None, is_causal=False)
            return out[0], lse[0]
        grouped = (
            query_TQD.reshape(num_queries, num_groups, -1, size).transpose(1, 2).reshape(-1, num_groups, size)
        )
        out, lse = self._attend(grouped[None], keys_SKD[None], values_SKD[None], None, is_causal=False)
        out = out.view(num_queries, -1, num_groups, size).transpose(1, 2).reshape(query_TQD.shape)
        return out, lse.view(num_queries, -1, num_groups).transpose(1, 2).reshape(num_queries, num_heads)

    def _attend(
        self, query_BTQD: Tensor, keys_BSKD: Tensor, values_BSKD: Tensor, bias: Tensor | None, is_causal: bool
    ) -> tuple[Tensor, Tensor]:
        query, keys, values = (x.transpose(1, 2) for x in (query_BTQD, keys_BSKD, values_BSKD))
        out, lse = _scaled_attention(query, keys, values, self.scaling, bias, is_causal)
        return out.transpose(1, 2), lse.transpose(1, 2)


def _scaled_attention(
    query_BQTD: Tensor,
    keys_BKSD: Tensor,
    values_BKSD: Tensor,
    scaling: float,
    bias: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """One attention call and its log-sum-exp: out (B, Q, T, D), lse (B, Q, T) float32.

    ``bias`` float32 expands to (B, Q, T, S). Causal means T = S.
    """
    if query_BQTD.is_cpu:
        mask = None
        if bias is not None:
            mask = bias.to(query_BQTD.dtype).expand(*query_BQTD.shape[:3], keys_BKSD.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_BQTD, keys_BKSD, values_BKSD, 0.0, is_causal, attn_mask=mask, scale=scaling
        )
        return out, lse
    group = query_BQTD.shape[1] // keys_BKSD.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (keys_BKSD, values_BKSD))
    scores = torch.matmul(query_BQTD, keys.transpose(-1, -2)).float() * scaling
    if bias is not None:
        scores = scores + bias
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).to(values.dtype)
    return torch.matmul(weights, values), lse


def _merge_into(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Make ``out_a`` the attention over two disjoint sets of keys, from the attention over each."""
    weight_b = torch.sigmoid(lse_b - lse_a)[..., None]
    out_a.lerp_(out_b, weight_b.to(out_a.dtype))


def register() -> None:
    """Make the engine's attention known to transformers.

    There is no mask function of that name, so transformers makes no mask and does not look at the
    positions for one, which would have a GPU's host wait in every step.
    """
    AttentionInterface.register(ATTENTION_NAME, arena_attention)
