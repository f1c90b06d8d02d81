"""Decode steps as CUDA graphs: recorded once a shape, replayed with new numbers in the same places.

A step of decoding is padded to one of a few row counts, and room is kept for a fixed number of prefix
tiles, so a handful of graphs serves a whole job. Everything that differs from step to step lies in one
tensor that is copied in before the replay; how many keys a row has is read from there by the kernels.
Tokens that the host has not read yet come from the device into the same place.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from b2batch.engine.cuda_attention import AttentionPlan, Upload
from b2batch.engine.sampling import fill_in
from b2batch.engine.span_attention import LayerAttention
from b2batch.engine.spans import StepRows, buckets, pad_rows, prefix_capacity

logger = logging.getLogger(__name__)

_USES_BEFORE_RECORDING = 3  # a batch that shrinks passes through shapes that never come back

Forward = Callable[[Tensor, Tensor, Tensor, LayerAttention], Tensor]
"""(token ids, positions, slots, attention) of T rows → logits (T, V)."""


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """A step in one of the shapes that graphs are made for."""

    bucket: int
    prefix_tiles: int
    rows: StepRows


class Buckets:
    """Which shape a decode step takes. Pure."""

    def __init__(self, max_num_rows: int, scratch_slot: int) -> None:
        self._sizes = buckets(max_num_rows)
        self._scratch_slot = scratch_slot

    @property
    def largest(self) -> int:
        """The most rows of any shape."""
        return self._sizes[-1]

    def pad(self, rows: StepRows) -> PaddedStep:
        """The step in the smallest shape that holds it."""
        size = self._sizes[bisect_left(self._sizes, rows.num_rows)]
        return PaddedStep(size, prefix_capacity(rows, size), pad_rows(rows, size, self._scratch_slot))


class _Shape:
    """One shape's inputs, which stay where they are, and its graph once it is worth one."""

    def __init__(self, inputs: Upload, attention: LayerAttention) -> None:
        self.inputs = inputs
        self.attention = attention
        self.num_uses = 0
        self.graph: torch.cuda.CUDAGraph | None = None


class DecodeGraphs:
    """Runs padded decode steps; the logits of a step are overwritten by the next.

    Without a device that records graphs it runs the same padded steps one kernel after the other.
    """

    def __init__(
        self,
        forward: Forward,
        plan: Callable[[StepRows, int], AttentionPlan],
        shapes: Buckets,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._plan = plan
        self._buckets = shapes
        self._device = device
        self._can_record = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._can_record else None
        self._shapes: dict[tuple[int, int], _Shape] = {}
        self._logits: Tensor | None = None  # (largest bucket, V), shared by all graphs

    @property
    def num_recorded(self) -> int:
        """Graphs that exist."""
        return sum(shape.graph is not None for shape in self._shapes.values())

    def run(self, rows: StepRows, unread: Tensor | None = None) -> Tensor:
        """Logits (rows, V) of a decode step; ``unread`` as in ``Runner.run``."""
        step = self._buckets.pad(rows)
        shape = self._shape(step)
        fill_in(shape.inputs.lists[0], unread)
        shape.num_uses += 1
        if shape.graph is None and self._can_record and shape.num_uses > _USES_BEFORE_RECORDING:
            self._record(step, shape)
        if shape.graph is None:
            return self._compute(shape)[: rows.num_rows]
        shape.graph.replay()
        assert self._logits is not None
        return self._logits[: rows.num_rows]

    def _shape(self, step: PaddedStep) -> _Shape:
        """The step's shape with the step's numbers in it."""
        plan = self._plan(step.rows, step.prefix_tiles)
        lists = [step.rows.tokens, step.rows.positions, step.rows.slots, *plan.tables]
        key = step.bucket, step.prefix_tiles
        shape = self._shapes.get(key)
        if shape is None:
            inputs = Upload.of(lists, self._device)
            _, positions, _, *tables = inputs.lists
            shape = self._shapes[key] = _Shape(inputs, plan.attention(positions, tables))
        else:
            shape.inputs.renew(lists)
        return shape

    def _compute(self, shape: _Shape) -> Tensor:
        tokens, positions, slots, *_ = shape.inputs.lists
        return self._forward(tokens, positions, slots, shape.attention)

    def _record(self, step: PaddedStep, shape: _Shape) -> None:
        """Record the shape's graph; the first failure ends all recording, and steps run without."""
        graph = torch.cuda.CUDAGraph()
        try:
            logits = self._room(step.bucket, shape)
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits.copy_(self._compute(shape))
        except RuntimeError as error:
            self._can_record = False
            logger.warning("decode steps run without CUDA graphs: %s", str(error)[:300])
            return
        shape.graph = graph

    def _room(self, bucket: int, shape: _Shape) -> Tensor:
        """Where the graph leaves its logits; made for the largest bucket at once."""
        if self._logits is None:
            sample = self._compute(shape)
            self._logits = sample.new_empty(self._buckets.largest, sample.shape[1])
        return self._logits[:bucket]
