"""Attention over the arena: the function that transformers' attention interface calls, in every layer.

A step runs as one packed row of tokens of many sequences. Each chunk of it attends to up to two
stretches of keys, and the two results are merged by their log-sum-exp:

    own span   |--- past ---|-- chunk --|      causal, one call a chunk
    prefix     |------------------------|      dense, one call for all chunks that share it

Keys and values of the whole step are written before anything attends, so a prefix may be computed
in the very step that first uses it.

Shapes: T tokens of the step · Q query heads · K key heads · G = Q / K · S keys · D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "b2batch"


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
class PrefixCall:
    """Queries [query, query + num_queries) of neighbouring chunks against one shared prefix."""

    query: int
    num_queries: int
    key: int
    num_keys: int


class LayerAttention(Protocol):
    """A step's attention where a device has better than the calls below; it knows the step's stretches."""

    def begin(self) -> None:
        """Called once before the first layer of each step."""
        ...

    def attend(
        self, query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float, slopes: Tensor | None
    ) -> Tensor:
        """A layer's queries against the layer's arena, the new keys and values included: (T, Q, D)."""
        ...


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the attention function must know of the step and cannot be passed through the model.

    ``slots`` (T,) says where each token's key and value go; ``positions`` (T,) its position in its
    sequence; ``caches`` is (keys, values) of each layer, each (arena tokens, K, D). With a
    ``backend`` the calls are not used.
    """

    slots: Tensor
    positions: Tensor
    own_calls: Sequence[OwnCall]
    prefix_calls: Sequence[PrefixCall]
    caches: Sequence[tuple[Tensor, Tensor]]
    backend: LayerAttention | None = None


_current: ContextVar[StepContext] = ContextVar("b2batch_step")


@contextmanager
def step_context(context: StepContext) -> Iterator[None]:
    """Make ``context`` the one that attention layers see; some models drop keyword arguments on the way."""
    token = _current.set(context)
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
    step = _current.get()
    keys_SKD, values_SKD = step.caches[cast(int, module.layer_idx)]
    keys_SKD.index_copy_(0, step.slots, key[0].transpose(0, 1).to(keys_SKD.dtype))
    values_SKD.index_copy_(0, step.slots, value[0].transpose(0, 1).to(values_SKD.dtype))
    slopes: Tensor | None = getattr(module, "alibi_slopes", None)
    query_TQD = query[0].transpose(0, 1)
    if step.backend is not None:
        return step.backend.attend(query_TQD, keys_SKD, values_SKD, scaling, slopes)[None], None
    out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
    lse_TQ = query_TQD.new_empty(query_TQD.shape[:2], dtype=torch.float32) if step.prefix_calls else None
    for own in step.own_calls:
        rows = slice(own.query, own.query + own.num_queries)
        span = slice(own.key, own.key + own.num_keys)
        out, lse = _attend_own(query_TQD[rows], keys_SKD[span], values_SKD[span], scaling, slopes)
        out_TQD[rows] = out
        if lse_TQ is not None:
            lse_TQ[rows] = lse
    for call in step.prefix_calls:
        assert lse_TQ is not None
        rows = slice(call.query, call.query + call.num_queries)
        span = slice(call.key, call.key + call.num_keys)
        positions = step.positions[rows]
        out, lse = _attend_prefix(
            query_TQD[rows], keys_SKD[span], values_SKD[span], scaling, slopes, positions
        )
        out_TQD[rows] = _merge(out_TQD[rows], lse_TQ[rows], out, lse)
    return out_TQD[None], None


def _attend_own(
    query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal attention of the newest T tokens of a span to all S of it: out (T, Q, D), lse (T, Q)."""
    num_queries, num_keys = len(query_TQD), len(keys_SKD)
    bias: Tensor | None = None
    if slopes is not None or 1 < num_queries < num_keys:
        bias = _causal_bias(num_queries, num_keys, slopes, query_TQD.device)
    if num_queries == 1:
        return _attend_grouped(query_TQD, keys_SKD, values_SKD, scaling, bias)
    group = query_TQD.shape[1] // keys_SKD.shape[1]
    keys_SQD, values_SQD = keys_SKD, values_SKD
    if group > 1:
        keys_SQD, values_SQD = (x.repeat_interleave(group, dim=1) for x in (keys_SKD, values_SKD))
    return _attend(query_TQD, keys_SQD, values_SQD, scaling, bias, is_causal=bias is None)


def _causal_bias(num_queries: int, num_keys: int, slopes: Tensor | None, device: torch.device) -> Tensor:
    """slope·(j - i) where j ≤ i and -inf elsewhere, (1 or Q, T, S) float32; slope 0 without ALiBi."""
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    distance = torch.arange(num_keys, device=device)[None, :] - queries[:, None]
    bias = torch.zeros_like(distance, dtype=torch.float32)[None]
    if slopes is not None:
        bias = slopes[:, None, None] * distance
    return bias.masked_fill(distance > 0, float("-inf"))


def _attend_prefix(
    query_TQD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    scaling: float,
    slopes: Tensor | None,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of T queries, all of them after the prefix, to its S keys: out (T, Q, D), lse (T, Q).

    The ALiBi bias slope·(j - i) is slope·(j - S), the same for every query, plus slope·(S - i),
    which is the same for every key: the second part only shifts the log-sum-exp.
    """
    if slopes is None:
        return _attend_grouped(query_TQD, keys_SKD, values_SKD, scaling, None)
    num_keys = len(keys_SKD)
    to_end = torch.arange(-num_keys, 0, device=slopes.device)
    bias = (slopes[:, None] * to_end)[:, None, :]
    out, lse = _attend(query_TQD, keys_SKD, values_SKD, scaling, bias, is_causal=False)
    return out, lse + slopes[None, :] * (num_keys - positions)[:, None]


def _attend_grouped(
    query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Non-causal attention in which the query heads of a group ride along the query axis."""
    num_queries, num_heads, size = query_TQD.shape
    num_groups = keys_SKD.shape[1]
    if num_groups == num_heads:
        return _attend(query_TQD, keys_SKD, values_SKD, scaling, bias, is_causal=False)
    grouped = query_TQD.view(num_queries, num_groups, -1, size).transpose(1, 2).reshape(-1, num_groups, size)
    out, lse = _attend(grouped, keys_SKD, values_SKD, scaling, bias, is_causal=False)
    out = out.view(num_queries, -1, num_groups, size).transpose(1, 2).reshape(query_TQD.shape)
    return out, lse.view(num_queries, -1, num_groups).transpose(1, 2).reshape(num_queries, num_heads)


def _attend(
    query_TQD: Tensor,
    keys_SQD: Tensor,
    values_SQD: Tensor,
    scaling: float,
    bias: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """One attention call and its log-sum-exp; as many key as query heads; bias (1 or Q, 1 or T, S)."""
    query, keys, values = (x.transpose(0, 1)[None] for x in (query_TQD, keys_SQD, values_SQD))
    if query.is_cpu:
        mask = None
        if bias is not None:
            mask = bias[None].to(query.dtype).expand(1, *query.shape[1:3], keys.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scaling
        )
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    scores = torch.matmul(query, keys.transpose(-1, -2)).float() * scaling
    if bias is not None:
        scores = scores + bias
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).to(values.dtype)
    return torch.matmul(weights, values)[0].transpose(0, 1), lse[0].transpose(0, 1)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Attention over two disjoint sets of keys from the attention over each."""
    weight_a = torch.sigmoid(lse_a - lse_b)[..., None]
    return (out_a * weight_a + out_b * (1.0 - weight_a)).to(out_a.dtype)


def register() -> None:
    """Make the engine's attention known to transformers.

    There is no mask function of that name, so transformers makes no mask and does not look at the
    positions for one, which would have a GPU's host wait in every step.
    """
    AttentionInterface.register(ATTENTION_NAME, arena_attention)
