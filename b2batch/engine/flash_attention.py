"""FlashAttention 2 out of torch itself, over spans of the arena, for models without ALiBi.

``aten::_flash_attention_forward`` is told the starts of the spans in place of cumulative lengths and the
lengths as ``seqused_k``, so it reads the spans where they are. It is called by name: its signature differs
between torch's versions. (Its own ALiBi is compiled out of torch's wheels.)

Shapes: T rows · Q query heads · K key heads · S arena tokens · D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from b2batch.engine.span_attention import LayerAttention
from b2batch.engine.spans import Stretch

_NEEDED = {"cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal", "scale", "seqused_k"}


@dataclass(frozen=True, slots=True)
class FlashSpans:
    """One call: rows [first, stop), ``cu_rows`` and ``starts`` (spans + 1,), ``lengths`` (spans,), int32."""

    first: int
    stop: int
    max_rows: int
    max_keys: int
    cu_rows: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, stretches: Sequence[Stretch], tables: Sequence[Tensor]) -> FlashSpans:
        """The call over neighbouring stretches whose lists are on the device."""
        last = stretches[-1]
        return cls(
            stretches[0].query,
            last.query + last.num_queries,
            max(s.num_queries for s in stretches),
            max(s.num_keys for s in stretches),
            *(table.to(torch.int32) for table in tables),
        )


Flash = Callable[[Tensor, Tensor, Tensor, FlashSpans, bool, float], tuple[Tensor, Tensor]]


def torch_flash() -> Flash | None:
    """(queries (T, Q, D), keys, values (S, K, D), spans, is_causal, scaling) → (T, Q, D), lse (Q, T).

    None where this torch has no such operator.
    """
    operator = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if operator is None or not {a.name for a in operator.default._schema.arguments} >= _NEEDED:
        return None

    def flash(
        query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, spans: FlashSpans, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        found = operator(
            query=query_TQD,
            key=keys_SKD,
            value=values_SKD,
            cum_seq_q=spans.cu_rows,
            cum_seq_k=spans.starts,
            max_q=spans.max_rows,
            max_k=spans.max_keys,
            dropout_p=0.0,
            is_causal=causal,
            return_debug_mask=False,
            scale=scale,
            seqused_k=spans.lengths,
        )
        return found[0], found[1]

    return flash


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """One call over the own spans, one over the prefixes."""

    flash: Flash
    own: Sequence[Stretch]
    prefixes: Sequence[Stretch]

    @property
    def tables(self) -> list[list[int]]:
        """See ``AttentionPlan``."""
        return _tables(self.own) + (_tables(self.prefixes) if self.prefixes else [])

    def attention(self, positions_T: Tensor, tables: Sequence[Tensor]) -> LayerAttention:
        """See ``AttentionPlan``; positions show in the order of the rows already."""
        own = FlashSpans.of(self.own, tables[:3])
        prefixes = FlashSpans.of(self.prefixes, tables[3:]) if self.prefixes else None
        return FlashAttention(self.flash, own, prefixes)


def _tables(stretches: Sequence[Stretch]) -> list[list[int]]:
    """Row boundaries, starts (with a last one that nobody reads) and lengths of neighbouring stretches."""
    first = stretches[0].query
    bounds = [0, *(s.query + s.num_queries - first for s in stretches)]
    assert bounds[:-1] == [s.query - first for s in stretches], "there are rows between the stretches"
    return [bounds, [*(s.key for s in stretches), 0], [s.num_keys for s in stretches]]


class FlashAttention:
    """One step's attention: the own spans, then the prefixes, merged by their log-sum-exp."""

    def __init__(self, flash: Flash, own: FlashSpans, prefixes: FlashSpans | None) -> None:
        self._flash = flash
        self._own = own
        self._prefixes = prefixes

    def begin(self) -> None:
        """Nothing is kept from step to step."""

    def attend(
        self, query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float, slopes: Tensor | None
    ) -> Tensor:
        """See ``LayerAttention``."""
        assert slopes is None, "this FlashAttention has no ALiBi"
        out, lse_QT = self._flash(query_TQD, keys_SKD, values_SKD, self._own, True, scaling)
        prefixes = self._prefixes
        if prefixes is not None:
            rows = slice(prefixes.first, prefixes.stop)
            before, before_lse = self._flash(query_TQD[rows], keys_SKD, values_SKD, prefixes, False, scaling)
            weight_QT = torch.sigmoid(before_lse - lse_QT[:, rows])
            # In the outputs' dtype: the weight is rounded no more than they are.
            out[rows] = torch.lerp(out[rows], before, weight_QT.transpose(0, 1)[..., None].to(out.dtype))
        return out
