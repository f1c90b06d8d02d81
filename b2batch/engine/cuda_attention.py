"""Attention of a step on a GPU: which kernels, with all that they need on the device once a step.

    rotary, a prompt in the step      FlashAttention 2 out of torch
    decoding, or ALiBi                our Triton kernels
    neither is there, or is wrong     the plain runner and its ``attention.py``

Each path must give plain attention's numbers on the device before it is used.

Shapes: T tokens of the step · P parts of a row · Q query heads · K key heads · S arena tokens · D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from b2batch.engine.flash_attention import Flash, FlashPlan, torch_flash
from b2batch.engine.span_attention import LayerAttention
from b2batch.engine.spans import (
    TILE_FIELDS,
    StepRows,
    Stretch,
    choose_splits,
    prefix_tile_rows,
    tile_table,
)

logger = logging.getLogger(__name__)

_PROMPT_TILE_ROWS = 64
_ALIGNMENT = 2  # in int64: every list starts at a multiple of 16 bytes, as the kernels are compiled for
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_PROBE_KEYS = 400


class AttentionPlan(Protocol):
    """How one step attends, as lists that are not on the device yet."""

    @property
    def tables(self) -> list[list[int]]:
        """What must be there."""
        ...

    def attention(self, positions_T: Tensor, tables: Sequence[Tensor]) -> LayerAttention:
        """The step's attention, once it is there."""
        ...


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of a model as attention sees them."""

    num_heads: int
    num_key_heads: int
    head_dim: int
    dtype: torch.dtype
    has_slopes: bool


def load_kernels() -> ModuleType | None:
    """Our Triton kernels, None where there is no Triton."""
    try:
        from b2batch.engine import triton_attention
    except ImportError:
        return None
    return triton_attention


class CudaAttention:
    """Chooses each step's kernels; made once, when the model is loaded."""

    def __init__(self, shape: HeadShape, device: torch.device) -> None:
        self._shape = shape
        self.has_kernels = load_kernels() is not None and is_right(
            "our Triton kernels", self._by_kernels, shape, device
        )
        self._flash: Flash | None = None
        if shape.dtype != torch.float32 and not shape.has_slopes and device.type == "cuda":
            self._flash = torch_flash()
            if self._flash and not is_right("torch's FlashAttention", self._by_flash, shape, device):
                self._flash = None

    @property
    def is_usable(self) -> bool:
        """Whether any path computes the right thing here."""
        return self.has_kernels or self._flash is not None

    def plan(self, rows: StepRows, prefix_tiles: int | None = None) -> AttentionPlan:
        """How to attend in this step.

        With ``prefix_tiles`` (decoding only) the plan's shape depends on that and the number of rows alone.
        """
        if self._flash is not None and not (self.has_kernels and rows.is_decode):
            return self._by_flash(rows)
        return self._by_kernels(rows, prefix_tiles)

    def _by_kernels(self, rows: StepRows, prefix_tiles: int | None = None) -> AttentionPlan:
        return TritonPlan.of(rows, self._shape.num_key_heads, prefix_tiles)

    def _by_flash(self, rows: StepRows) -> AttentionPlan:
        assert self._flash is not None
        return FlashPlan(self._flash, rows.own, rows.prefixes)


# --- Triton ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """Tables of tiles, by what their rows are.

    The parts of a row: ``own_splits`` of its own span, then ``prefix_splits`` of its prefix.
    """

    single: list[int]  # stretches of one row
    chunks: list[int]  # stretches of more
    prefixes: list[int]
    prefix_rows: int
    own_splits: int
    prefix_splits: int

    @classmethod
    def of(cls, rows: StepRows, num_key_heads: int, prefix_tiles: int | None = None) -> TritonPlan:
        """The plan of a step; ``prefix_tiles`` is how many tiles to keep room for."""
        single = [s for s in rows.own if s.num_queries == 1]
        chunks = [s for s in rows.own if s.num_queries > 1]
        prefix_rows = prefix_tile_rows(rows.num_rows)
        prefixes = tile_table(rows.prefixes, prefix_rows, prefix_tiles)
        prefix_programs = len(prefixes) // TILE_FIELDS * num_key_heads
        return cls(
            tile_table(single, 1),
            tile_table(chunks, _PROMPT_TILE_ROWS),
            prefixes,
            prefix_rows,
            1 if chunks else choose_splits(len(single) * num_key_heads),
            choose_splits(prefix_programs) if prefixes else 0,
        )

    @property
    def tables(self) -> list[list[int]]:
        """See ``AttentionPlan``."""
        return [self.single, self.chunks, self.prefixes]

    def attention(self, positions_T: Tensor, tables: Sequence[Tensor]) -> LayerAttention:
        """See ``AttentionPlan``."""
        return TritonAttention(self, positions_T, tables)


class TritonAttention:
    """One step's attention by our kernels; the same object serves all layers, one after the other."""

    def __init__(self, plan: TritonPlan, positions_T: Tensor, tables: Sequence[Tensor]) -> None:
        from b2batch.engine import triton_attention as kernels

        self._kernels = kernels
        self._positions = positions_T
        self._num_parts = plan.own_splits + plan.prefix_splits
        launches = (
            (1, plan.own_splits, 0),
            (_PROMPT_TILE_ROWS, 1, 0),
            (plan.prefix_rows, plan.prefix_splits, plan.own_splits),
        )
        self._launches = [
            (kernels.Tiles(table.view(-1, TILE_FIELDS), num_rows, num_splits), first_part)
            for table, (num_rows, num_splits, first_part) in zip(tables, launches, strict=True)
            if len(table)
        ]
        self._parts: Tensor | None = None
        self._lse: Tensor | None = None

    def begin(self) -> None:
        """Forget the last step's parts: a row without a prefix writes none."""
        if self._lse is not None:
            self._lse.fill_(float("-inf"))

    def attend(
        self, query_TQD: Tensor, keys_SKD: Tensor, values_SKD: Tensor, scaling: float, slopes: Tensor | None
    ) -> Tensor:
        """See ``LayerAttention``."""
        out_TQD = torch.empty_like(query_TQD, memory_format=torch.contiguous_format)
        parts, lse = self._room(query_TQD)
        written = out_TQD[:, None] if parts is None else parts  # an only part is the result
        stored = (query_TQD, keys_SKD, values_SKD, self._positions)
        for tiles, first_part in self._launches:
            self._kernels.attend(*stored, scaling, slopes, tiles, written, lse, first_part)
        if parts is not None:
            self._kernels.merge(parts, lse, out_TQD)
        return out_TQD

    def _room(self, query_TQD: Tensor) -> tuple[Tensor | None, Tensor]:
        """Where the parts and their log-sum-exps go, made in the first layer."""
        if self._lse is None:
            tokens, heads, size = query_TQD.shape
            shape = (tokens, self._num_parts, heads)
            self._lse = query_TQD.new_full(shape, float("-inf"), dtype=torch.float32)
            if self._num_parts > 1:
                self._parts = query_TQD.new_empty((*shape, size), dtype=torch.float32)
        return self._parts, self._lse


# --- lists to the device -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upload:
    """Lists of ints as views into one tensor, so that they travel in one copy."""

    flat: Tensor
    lists: list[Tensor]

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]], device: torch.device) -> Upload:
        """int64 tensors on ``device``; the host does not wait for the copy."""
        flat, starts = _packed(lists)
        tensor = _pinned(flat, device).to(device, non_blocking=True)
        views = zip(starts, lists, strict=True)
        return cls(tensor, [tensor[start : start + len(values)] for start, values in views])

    def renew(self, lists: Sequence[Sequence[int]]) -> None:
        """Put other lists of the same lengths in the same place."""
        flat, _ = _packed(lists)
        self.flat.copy_(_pinned(flat, self.flat.device), non_blocking=True)


def _packed(lists: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """All lists behind each other, and where each starts."""
    flat: list[int] = []
    starts = []
    for values in lists:
        starts.append(len(flat))
        flat += values
        flat += [0] * (-len(flat) % _ALIGNMENT)
    return flat, starts


def _pinned(values: list[int], device: torch.device) -> Tensor:
    """On the host, in memory that ``device`` can copy from by itself."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory() if device.type == "cuda" else tensor


# --- does a path compute the right thing here? -------------------------------------------------------


def is_right(
    name: str, plan: Callable[[StepRows], AttentionPlan], shape: HeadShape, device: torch.device
) -> bool:
    """Whether a path gives the plain calls' numbers, for decoding and for a step with prompts."""
    try:
        errors = [_probe_error(plan, rows, shape, device) for rows in (_decode_rows(), _mixed_rows())]
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        logger.warning("%s cannot be used on %s: %s", name, device, str(error)[:300])
        return False
    except Exception as error:  # a compiler's own exception types
        logger.warning(
            "%s cannot be used on %s: %s: %s", name, device, type(error).__name__, str(error)[:300]
        )
        return False
    if not max(errors) < _PROBE_TOLERANCE[shape.dtype]:
        logger.warning("%s is not used on %s: it is off by %.2g", name, device, max(errors))
        return False
    return True


@torch.inference_mode()
def _probe_error(
    plan: Callable[[StepRows], AttentionPlan], rows: StepRows, shape: HeadShape, device: torch.device
) -> float:
    """The largest difference to plain attention, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)

    def normal(num_tokens: int, num_heads: int) -> Tensor:
        values = torch.randn(num_tokens, num_heads, shape.head_dim, generator=generator)
        return values.to(device, shape.dtype)

    slopes = torch.arange(1, shape.num_heads + 1, device=device) / (4.0 * shape.num_heads)
    query = normal(rows.num_rows, shape.num_heads)
    keys, values = normal(_PROBE_KEYS, shape.num_key_heads), normal(_PROBE_KEYS, shape.num_key_heads)
    inputs = (query, keys, values, shape.head_dim**-0.5, slopes if shape.has_slopes else None)
    chosen = plan(rows)
    positions, *tables = Upload.of([rows.positions, *chosen.tables], device).lists
    found = chosen.attention(positions, tables).attend(*inputs).float()
    expected = _plain(rows, *inputs)
    return float(((found - expected).abs().max() / expected.abs().max()).item())


def _plain(
    rows: StepRows,
    query_TQD: Tensor,
    keys_SKD: Tensor,
    values_SKD: Tensor,
    scaling: float,
    slopes: Tensor | None,
) -> Tensor:
    """Every row against the whole arena, of which the mask leaves what its stretches name."""
    device = query_TQD.device
    positions = torch.tensor(rows.positions, device=device)
    distance = torch.full((rows.num_rows, len(keys_SKD)), 1.0, device=device)
    for s in (*rows.own, *rows.prefixes):
        found = torch.arange(s.first_position, s.first_position + s.num_keys, device=device)
        of_rows = slice(s.query, s.query + s.num_queries)
        distance[of_rows, s.key : s.key + s.num_keys] = (found - positions[of_rows, None]).float()
    group = query_TQD.shape[1] // keys_SKD.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys_SKD, values_SKD))
    scores = torch.einsum("tqd,sqd->qts", query_TQD.float(), keys) * scaling
    if slopes is not None:
        scores += slopes[:, None, None] * distance
    weights = scores.masked_fill(distance > 0, float("-inf")).softmax(dim=-1)
    return torch.einsum("qts,sqd->tqd", weights, values)


def _decode_rows() -> StepRows:
    """Three rows without a prefix, two on one."""
    return _rows([Stretch(i, 1, 130 + 40 * i, 70 if i > 2 else 0, 7 * i + 5) for i in range(5)], 3)


def _mixed_rows() -> StepRows:
    """A prompt, the later chunk of one, and a row that decodes; the last two on a prefix."""
    return _rows([Stretch(0, 20, 130, 0, 20), Stretch(20, 1, 170, 70, 9), Stretch(21, 9, 210, 70, 100)], 1)


def _rows(own: list[Stretch], num_plain: int) -> StepRows:
    """A step of these stretches; all but the first ``num_plain`` are on a prefix of 70 tokens at slot 11."""
    positions: list[int] = []
    slots: list[int] = []
    for s in own:
        newest = range(s.num_keys - s.num_queries, s.num_keys)
        positions += [s.first_position + i for i in newest]
        slots += [s.key + i for i in newest]
    first = own[num_plain].query
    prefixes = [Stretch(first, len(slots) - first, 11, 0, 70)]
    return StepRows([0] * len(slots), positions, slots, own, prefixes, range(len(slots)))
