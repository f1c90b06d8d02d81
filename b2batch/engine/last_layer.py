"""The last decoder layer, without the tokens of which nobody wants to know more.

Of a prompt only the last token's logits are wanted. In the last layer all others matter by their
keys and values alone, so attention, output projection, feed-forward and final norm run for the
wanted tokens only: one layer's share of the prompts' cost, 3 % with 30 layers, 20 % with 4.

    first pass     all tokens       norm, projections, keys and values into the arena, and no further
    second pass    the wanted ones  the whole layer

It works on any layer that goes through the engine's attention: the first pass leaves the layer's own
code by an exception as soon as the keys stand in the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from b2batch.engine.attention import KeysWritten, StepContext, step_contexts
from b2batch.engine.calls import plan_calls
from b2batch.engine.scheduler import Chunk
from b2batch.models.layers import find_layers


class LastLayer:
    """Stands in for the last layer's ``forward``; does nothing else than it outside of ``only``."""

    def __init__(self, layer: nn.Module) -> None:
        before = getattr(layer.forward, "__self__", None)  # of an earlier engine with the same model
        self._forward: Callable[..., Any] = (
            before._forward if isinstance(before, LastLayer) else layer.forward
        )
        self._wanted: tuple[Tensor, StepContext, StepContext] | None = None
        layer.forward = self._run

    @classmethod
    def of(cls, model: PreTrainedModel) -> LastLayer | None:
        """The last of a model's layers; None where they do not stand in one list."""
        found = find_layers(model, model.config.get_text_config().num_hidden_layers)
        return None if found is None else cls(found[1][-1])

    @contextmanager
    def only(
        self, rows: Sequence[int], chunks: Sequence[Chunk], context: StepContext, *, joins_decodes: bool
    ) -> Iterator[bool]:
        """In this step return only ``rows``, those of ``chunks`` whose logits are wanted.

        Gives False, and changes nothing, where these are most of the step's rows. Where none is wanted
        the first row stands for them, since not every layer can run without a row.
        """
        rows = rows or [0]
        if 2 * len(rows) > len(context.positions):
            yield False
            return
        index = torch.tensor(rows, device=context.slots.device)
        single = [chunk for part in chunks for chunk in _of_one_token(part)]
        wanted = StepContext(
            context.slots[index[: len(single)]],
            context.positions[index],
            plan_calls(single, joins_decodes),
            context.caches,
        )
        self._wanted = index, replace(context, calls=None), wanted
        try:
            yield True
        finally:
            self._wanted = None

    def _run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._wanted is None:
            return self._forward(hidden, *args, **kwargs)
        rows, keys_only, wanted = self._wanted
        try:
            with step_contexts({hidden.device: keys_only}):
                self._forward(hidden, *args, **kwargs)
        except KeysWritten:
            pass
        num_rows = hidden.shape[1]
        args, kwargs = _select(args, rows, num_rows), _select(kwargs, rows, num_rows)
        with step_contexts({hidden.device: wanted}):
            return self._forward(hidden[:, rows], *args, **kwargs)


def _of_one_token(chunk: Chunk) -> Iterator[Chunk]:
    """The wanted tokens of a chunk, each as a chunk of its own."""
    for position in chunk.logit_positions:
        offset = position - chunk.start
        yield replace(
            chunk, start=position, num_tokens=1, slot=chunk.slot + offset, num_past=chunk.num_past + offset
        )


def _select(value: Any, rows: Tensor, num_rows: int) -> Any:
    """``value`` with the tensors in it cut to ``rows`` where they have an axis of the step's rows."""
    if isinstance(value, Tensor):
        axes = [axis for axis, size in enumerate(value.shape) if size == num_rows]
        return value.index_select(axes[0], rows) if axes else value
    if isinstance(value, tuple | list):
        return type(value)(_select(item, rows, num_rows) for item in value)
    if isinstance(value, dict):
        return {name: _select(item, rows, num_rows) for name, item in value.items()}
    return value
