"""The attention function of runners that know a step as stretches: transformers calls it in every layer.

It writes the step's keys and values into the layer's arena and leaves the rest to the step's attention,
which was chosen once for all layers.

Shapes: T tokens of the step · Q query heads · K key heads · S arena tokens · D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from b2batch.engine.attention import write_keys

ATTENTION_NAME = "b2batch-spans"


class LayerAttention(Protocol):
    """One step's attention; it knows the step's stretches and serves all layers, one after the other."""

    def begin(self) -> None:
        """Called before the first layer of each step."""
        ...

    def attend(
        self, query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float, slopes: Tensor | None
    ) -> Tensor:
        """A layer's queries against the layer's arena, the new keys and values included: (T, Q, D)."""
        ...


@dataclass(frozen=True, slots=True)
class SpanStep:
    """``slots`` (T,) is where each token's key and value go; ``caches`` (keys, values) of each layer."""

    slots: Tensor
    caches: Sequence[tuple[Tensor, Tensor]]
    attention: LayerAttention


_current: ContextVar[Mapping[torch.device, SpanStep]] = ContextVar("b2batch_span_step")


@contextmanager
def span_steps(steps: Mapping[torch.device, SpanStep]) -> Iterator[None]:
    """Let each layer see the step on its device; some models drop keyword arguments on the way."""
    token = _current.set(steps)
    for step in steps.values():
        step.attention.begin()
    try:
        yield
    finally:
        _current.reset(token)


def attend_spans(
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
    slopes: Tensor | None = getattr(module, "alibi_slopes", None)
    query_TQD = query[0].transpose(0, 1).to(keys_SKD.dtype)
    out_TQD = step.attention.attend(query_TQD, keys_SKD, values_SKD, scaling, slopes)
    return out_TQD[None].to(query.dtype), None


def register() -> None:
    """Make it known to transformers.

    There is no mask function of that name, so transformers makes no mask and does not look at the
    positions for one, which would have the host wait for the device in every step.
    """
    AttentionInterface.register(ATTENTION_NAME, attend_spans)
