"""The runner of a GPU: all numbers of a step in one copy, our kernels, graphs for steps of decoding."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from b2batch.engine import span_attention
from b2batch.engine.cuda_attention import CudaAttention, HeadShape, Upload
from b2batch.engine.graphs import Buckets, DecodeGraphs
from b2batch.engine.runner import KVShape, Runner
from b2batch.engine.sampling import fill_in
from b2batch.engine.scheduler import Chunk, Step
from b2batch.engine.span_attention import LayerAttention, SpanStep, span_steps
from b2batch.engine.spans import StepRows, Stretch

logger = logging.getLogger(__name__)


def make_runner(model: PreTrainedModel, kv_cache_tokens: int, max_num_seqs: int) -> Runner:
    """The runner for the device that the model is on; the plain one where no kernel is usable."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        kernels = CudaAttention(head_shape(model), device)
        if kernels.is_usable:
            return CudaRunner(model, kv_cache_tokens, max_num_seqs, kernels)
        logger.warning("no attention kernel is usable on %s: the plain path is slow", device)
    return Runner(model, kv_cache_tokens)


class CudaRunner(Runner):
    """Its arena has one slot more than the scheduler knows of, for the rows that pad a graph."""

    def __init__(
        self, model: PreTrainedModel, kv_cache_tokens: int, max_num_seqs: int, kernels: CudaAttention
    ) -> None:
        super().__init__(model, kv_cache_tokens + 1)
        span_attention.register()
        model.set_attn_implementation(span_attention.ATTENTION_NAME)
        self._kernels = kernels
        self._graphs: DecodeGraphs | None = None
        if kernels.has_kernels and len(self.devices) == 1:  # a graph is of one device
            shapes = Buckets(max_num_seqs, scratch_slot=kv_cache_tokens)
            self._graphs = DecodeGraphs(self._forward, kernels.plan, shapes, self.device)

    @property
    def num_graphs(self) -> int:
        """Shapes of decode steps that have been recorded."""
        return self._graphs.num_recorded if self._graphs else 0

    @torch.inference_mode()
    def run(self, step: Step, unread: Tensor | None = None) -> Tensor:
        """See ``Runner``; what it returns is overwritten by the next step."""
        for move in step.moves:
            self._move(move)
        rows = step_rows(step.chunks)
        if self._graphs is not None and rows.is_decode:
            return self._graphs.run(rows, unread)
        plan = self._kernels.plan(rows)
        lists = [rows.tokens, rows.positions, rows.slots, rows.wanted, *plan.tables]
        uploads = {device: Upload.of(lists, device).lists for device in self.devices}
        steps = {
            device: SpanStep(slots, self.caches, plan.attention(positions, tables))
            for device, (_, positions, slots, _, *tables) in uploads.items()
        }
        tokens, positions, _, wanted, *_ = uploads[self.device]
        fill_in(tokens, unread)
        if len(self.devices) > 1:
            wanted = torch.tensor(rows.wanted, device=self.index_device)
        return self._compute(tokens, positions, steps, wanted)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        layers: LayerAttention,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """float32 logits of the wanted rows, or of all."""
        return self._compute(tokens, positions, {self.device: SpanStep(slots, self.caches, layers)}, wanted)

    def _compute(
        self,
        tokens: Tensor,
        positions: Tensor,
        steps: Mapping[torch.device, SpanStep],
        wanted: Tensor | None,
    ) -> Tensor:
        with span_steps(steps):
            output = self.model(
                input_ids=tokens[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if wanted is None else wanted,
            )
        logits: Tensor = output.logits[0]
        return logits.float()


def head_shape(model: PreTrainedModel) -> HeadShape:
    """A model's heads; ALiBi shows in its attention modules."""
    shape = KVShape.of(model)
    num_heads = model.config.get_text_config().num_attention_heads
    has_slopes = any(getattr(module, "alibi_slopes", None) is not None for module in model.modules())
    return HeadShape(num_heads, shape.num_heads, shape.head_dim, shape.dtype, has_slopes)


def step_rows(chunks: Sequence[Chunk]) -> StepRows:
    """A step's chunks as rows and stretches; neighbours on one prefix are one stretch."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    own: list[Stretch] = []
    prefixes: list[Stretch] = []
    previous = None
    for chunk in chunks:
        row, past = len(tokens), chunk.num_past
        own.append(
            Stretch(row, chunk.num_tokens, chunk.slot - past, chunk.start - past, past + chunk.num_tokens)
        )
        if chunk.prefix is not None:
            first = prefixes.pop().query if chunk.prefix is previous else row
            num_rows = row + chunk.num_tokens - first
            prefixes.append(Stretch(first, num_rows, chunk.prefix.span.start, 0, chunk.prefix.length))
        previous = chunk.prefix
        wanted += [row + position - chunk.start for position in chunk.logit_positions]
        tokens += chunk.tokens
        positions += range(chunk.start, chunk.start + chunk.num_tokens)
        slots += range(chunk.slot, chunk.slot + chunk.num_tokens)
    return StepRows(tokens, positions, slots, own, prefixes, wanted)
