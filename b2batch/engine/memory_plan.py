"""Does a model fit a device, and what would make it fit? Worked out from its config, before anything loads.

A device holds, beside what CUDA itself takes, the weights, the work of the largest step, what CUDA graphs
keep and, of what is left, ``engine.gpu_memory_utilization`` for keys and values. Of a model over several
devices (``models/spreading.py``) the one with the least room a layer counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from b2batch.errors import SpecError
from b2batch.models.checkpoint import Checkpoint
from b2batch.models.facts import gpu_dtype
from b2batch.models.footprint import (
    Architecture,
    graph_bytes,
    kv_bytes_per_token,
    stages,
    weight_bytes,
    workspace_bytes,
)
from b2batch.spec import EngineSpec, JobSpec

GB = 1_000_000_000
_CPU_SEQS, _CPU_TOKENS = 64, 1024
_CUDA_SEQS, _CUDA_TOKENS = 256, 8192
_CONTEXT_BYTES = 600_000_000  # what CUDA and torch hold on a device before the first tensor
_FEW_CONTEXTS = 16  # with room for fewer full contexts a GPU waits for memory rather than for work
_MOST_GPUS = 8  # of a node, in advice
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)?", re.IGNORECASE)
_BYTES_OF_UNIT = {"gb": GB, "gib": 1 << 30, "mb": 1_000_000, "mib": 1 << 20}


@dataclass(frozen=True, slots=True)
class StepSize:
    """The most that one step of the engine takes in."""

    max_num_seqs: int
    max_num_batched_tokens: int

    @classmethod
    def of(cls, spec: EngineSpec, *, on_cpu: bool) -> StepSize:
        """The spec's, with ``auto`` settled for the kind of device.

        Raises:
            SpecError: some sequences would never get their next token.
        """
        seqs, tokens = (_CPU_SEQS, _CPU_TOKENS) if on_cpu else (_CUDA_SEQS, _CUDA_TOKENS)
        max_num_seqs = seqs if spec.max_num_seqs == "auto" else spec.max_num_seqs
        asked = spec.max_num_batched_tokens
        budget = max(tokens, max_num_seqs) if asked == "auto" else asked
        if budget < max_num_seqs:
            raise SpecError(
                f"engine.max_num_batched_tokens: {budget} is less than max_num_seqs {max_num_seqs}, "
                "so some sequences would never get their next token"
            )
        return cls(max_num_seqs, budget)


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """What devices of ``device_bytes`` each hold. ``num_contexts`` counts sequences of full length."""

    device_bytes: int
    num_devices: int
    num_kv_tokens: int
    num_contexts: float
    fits: bool
    advice: str


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A model and how it is to be run, as far as memory goes."""

    shape: Architecture
    dtype: str
    kv_dtype: str
    quantization: str | None
    can_quantize: bool
    max_model_len: int
    step: StepSize
    utilization: float
    num_devices: int = 1
    has_graphs: bool = True

    @classmethod
    def of(cls, spec: JobSpec, checkpoint: Checkpoint, max_model_len: int) -> MemoryPlan:
        """The plan of a job on GPUs, or on a CPU where the spec asks for one."""
        stored, dtype = checkpoint.quantization, gpu_dtype(checkpoint, spec.model)
        kv_dtype, on_cpu = spec.engine.kv_cache_dtype, spec.model.device == "cpu"
        return cls(
            shape=Architecture.of(checkpoint.config),
            dtype=dtype,
            kv_dtype=dtype if kv_dtype == "auto" else kv_dtype,
            quantization=stored or spec.model.quantization,
            can_quantize=stored is None,
            max_model_len=max_model_len,
            step=StepSize.of(spec.engine, on_cpu=on_cpu),
            utilization=spec.engine.gpu_memory_utilization,
            num_devices=spec.cluster.gpus_per_model,
            has_graphs=not on_cpu,
        )

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return weight_bytes(self.shape, self.dtype, self.quantization)

    @property
    def kv_bytes_per_token(self) -> int:
        return kv_bytes_per_token(self.shape, self.kv_dtype)

    @property
    def workspace_bytes(self) -> int:
        """Beside weights and KV, on each device."""
        num_seqs, num_tokens = self.step.max_num_seqs, self.step.max_num_batched_tokens
        work = workspace_bytes(self.shape, self.dtype, num_seqs, num_tokens)
        if self.has_graphs and self.num_devices == 1:
            work += graph_bytes(self.shape, self.dtype, num_seqs)
        return work

    def num_kv_tokens(self, device_bytes: int) -> int:
        """Tokens of keys and values that devices of this size hold; 0 where not even the weights fit."""
        room = device_bytes - _CONTEXT_BYTES - self.workspace_bytes
        of_a_layer = self.kv_bytes_per_token // self.shape.num_layers
        return min(
            max(0, int((room - stage.weight_bytes) * self.utilization)) // (stage.num_layers * of_a_layer)
            for stage in stages(self.shape, self.dtype, self.quantization, self.num_devices)
            if stage.num_layers
        )

    def on(self, device_bytes: int) -> MemoryFit:
        """How the model fits a device of this size, and what would give it more room."""
        num_tokens = self.num_kv_tokens(device_bytes)
        num_contexts = num_tokens / self.max_model_len
        return MemoryFit(
            device_bytes,
            self.num_devices,
            num_tokens,
            num_contexts,
            num_contexts >= 1,
            self._advice(device_bytes, num_contexts),
        )

    def _advice(self, device_bytes: int, num_contexts: float) -> str:
        better = []
        for method in self._smaller():
            tokens = replace(self, quantization=method).num_kv_tokens(device_bytes)
            if (contexts := tokens / self.max_model_len) >= max(1.0, 2 * num_contexts):
                better.append(f"model.quantization: {method} ({contexts:.1f} full contexts)")
        if num_contexts < 1:
            better += self._spread(device_bytes)
            if not better:
                return f"does not fit, quantised or not, nor over {_MOST_GPUS} GPUs"
            return f"does not fit; would: {', or '.join(better)}"
        if num_contexts < _FEW_CONTEXTS and better:
            return f"fits, with few long sequences at a time; more room: {', or '.join(better)}"
        return "fits"

    def _spread(self, device_bytes: int) -> list[str]:
        """The fewest GPUs, of those that divide a node evenly, over which the model fits as it is."""
        num_devices = 2 * self.num_devices
        while num_devices <= _MOST_GPUS:
            tokens = replace(self, num_devices=num_devices).num_kv_tokens(device_bytes)
            if (contexts := tokens / self.max_model_len) >= 1:
                return [f"cluster.gpus_per_replica: {num_devices} ({contexts:.1f} full contexts)"]
            num_devices *= 2
        return []

    def _smaller(self) -> tuple[str, ...]:
        if not self.can_quantize:
            return ()
        return {None: ("int8", "nf4"), "int8": ("nf4",)}.get(self.quantization, ())


def parse_size(text: str) -> int:
    """``24GB``, ``23.6 GiB``, ``24`` (GB) → bytes; SpecError for what is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise SpecError(f"{text!r} is no size of memory; write for example 24GB or 23.6GiB")
    return int(float(match[1]) * _BYTES_OF_UNIT[(match[2] or "GB").lower()])
