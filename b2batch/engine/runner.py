"""A step's schedule → tensors → one forward pass → the logits that are wanted."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from b2batch.engine import attention
from b2batch.engine.attention import StepContext
from b2batch.engine.calls import plan_calls
from b2batch.engine.cpu_attention import compile_kernels, computes
from b2batch.engine.kv import Span
from b2batch.engine.last_layer import LastLayer
from b2batch.engine.sampling import fill_in
from b2batch.engine.scheduler import Chunk, Move, Step
from b2batch.errors import ModelError

_ROWS = 16  # what the rows of a large step are a multiple of on a CPU
_MAX_EXACT_ROWS = 64  # up to here a step has exactly the rows of its tokens


class Runner:
    """Owns the arena of keys and values and runs the model over it."""

    def __init__(self, model: PreTrainedModel, kv_cache_tokens: int) -> None:
        attention.register()
        model.set_attn_implementation(attention.ATTENTION_NAME)
        self.model = model
        self.device = next(model.parameters()).device
        layers = layer_devices(model)
        self.devices = tuple(dict.fromkeys((self.device, *layers)))
        shape = KVShape.of(model)
        self._joins_decodes = computes(self.device, shape.dtype)
        if self._joins_decodes:
            compile_kernels(shape.head_dim)
        self.caches = [
            (shape.arena(kv_cache_tokens, device), shape.arena(kv_cache_tokens, device)) for device in layers
        ]
        self._last_layer = LastLayer.of(model) if len(self.devices) == 1 else None
        self._hidden: Tensor | None = None

    def keep_hidden(self) -> None:
        """From now on keep each step's hidden states, for embeddings."""
        if self._hidden is None:
            self._hidden = torch.empty(0)
            self._last_layer = None
            self.model.base_model.register_forward_hook(self._note_hidden)

    @property
    def hidden(self) -> Tensor:
        """Hidden states after the last layer of all tokens of the last step: (T, C)."""
        assert self._hidden is not None
        return self._hidden

    def _note_hidden(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._hidden = output[0][0]

    @torch.inference_mode()
    def run(self, step: Step, unread: Tensor | None = None) -> Tensor:
        """Logits of the step's wanted positions, in chunk order: (R, V) float32.

        ``unread``: what the last step sampled, for sequences that end in a token of it; see ``sampling``.
        """
        for move in step.moves:
            self._move(move)
        chunks = step.chunks
        tokens = [token for chunk in chunks for token in chunk.tokens]
        positions = [chunk.start + i for chunk in chunks for i in range(chunk.num_tokens)]
        slots = [chunk.slot + i for chunk in chunks for i in range(chunk.num_tokens)]
        padding = [0] * self._num_padding(len(tokens))
        tokens += padding
        positions += padding
        calls = plan_calls(chunks, self._joins_decodes)
        contexts = {
            device: StepContext(_ids(slots, device), _ids(positions, device), calls, self.caches)
            for device in self.devices
        }
        wanted = _wanted_rows(chunks)
        context = contexts[self.device]
        ids = _ids(tokens, self.device)
        fill_in(ids, unread)
        with attention.step_contexts(contexts), self._only(wanted, chunks, context) as is_cut:
            output = self.model(
                input_ids=ids[None],
                position_ids=context.positions[None],
                use_cache=False,
                logits_to_keep=_ids(list(range(len(wanted))) if is_cut else wanted, self.index_device),
            )
        logits: Tensor = output.logits[0]
        return logits.float()

    def _only(
        self, wanted: list[int], chunks: list[Chunk], context: StepContext
    ) -> AbstractContextManager[bool]:
        if self._last_layer is None:
            return nullcontext(False)
        return self._last_layer.only(wanted, chunks, context, joins_decodes=self._joins_decodes)

    def _num_padding(self, num_tokens: int) -> int:
        """Rows to add to a step, so that few sizes of large steps occur; nothing attends to them.

        oneDNN compiles a kernel for each number of rows that it meets, as long a work as the product of
        a small layer: 5 % of a job on the embedded model.
        """
        return -num_tokens % _ROWS if self.device.type == "cpu" and num_tokens > _MAX_EXACT_ROWS else 0

    def scrub(self, span: Span) -> None:
        """Zero a span whose keys or values may not be finite: the next one there must not meet them."""
        for cache in (tensor for pair in self.caches for tensor in pair):
            cache[span.start : span.stop] = 0

    def _move(self, move: Move) -> None:
        for cache in (tensor for pair in self.caches for tensor in pair):
            stretch = cache[move.source : move.source + move.num_tokens].clone()
            cache[move.target : move.target + move.num_tokens] = stretch

    @property
    def index_device(self) -> torch.device:
        """Where the index of the wanted rows belongs. One on the host fits hidden states on any device."""
        return self.device if len(self.devices) == 1 else torch.device("cpu")


def _wanted_rows(chunks: list[Chunk]) -> list[int]:
    """Rows of the packed step whose logits are wanted."""
    rows: list[int] = []
    first = 0
    for chunk in chunks:
        rows += [first + position - chunk.start for position in chunk.logit_positions]
        first += chunk.num_tokens
    return rows


def _ids(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """The device of each layer's attention, which is where its keys and values belong."""
    default = next(model.parameters()).device
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if index is not None and weight is not None:
            found[index] = weight.device
    return [found.get(index, default) for index in range(model.config.get_text_config().num_hidden_layers)]


class KVShape:
    """What one token's keys and values take, read from a model's config."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dtype = dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> KVShape:
        """The shape of a loaded model's cache, in the model's dtype unless it has a ``kv_cache_dtype``."""
        config = model.config.get_text_config()
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = getattr(model, "kv_cache_dtype", model.dtype)
        return cls(config.num_hidden_layers, num_heads, head_dim, dtype)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return self.num_layers * self.bytes_per_layer

    @property
    def bytes_per_layer(self) -> int:
        """Keys and values of one layer."""
        return 2 * self.num_heads * self.head_dim * self.dtype.itemsize

    def arena(self, num_tokens: int, device: torch.device) -> Tensor:
        """Room for one layer's keys, or values: (tokens, K, D).

        Zeros, since a masked key counts for nothing only as long as it is finite. On a CPU the system
        deals them out page by page: memory that no sequence reaches is never taken.
        """
        shape = (num_tokens, self.num_heads, self.head_dim)
        try:
            if device.type == "cpu":
                zeros = np.zeros(math.prod(shape) * self.dtype.itemsize, dtype=np.uint8)
                return torch.from_numpy(zeros).view(self.dtype).view(shape)
            return torch.zeros(shape, dtype=self.dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            raise ModelError(
                f"engine.kv_cache_tokens: no room for {num_tokens} tokens of keys and values at "
                f"{self.bytes_per_token} bytes each: {error}"
            ) from error
