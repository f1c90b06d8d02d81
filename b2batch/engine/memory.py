"""How large the engine's limits may be: ``auto`` settings → numbers, from the memory that is there."""

from __future__ import annotations

import os

import torch

from b2batch.engine.runner import KVShape
from b2batch.engine.scheduler import Limits
from b2batch.errors import SpecError
from b2batch.spec import EngineSpec

_CPU_SEQS, _CPU_TOKENS = 64, 1024
_CUDA_SEQS, _CUDA_TOKENS = 256, 8192
_CPU_SHARE = 0.2  # of the memory that is free: several replicas may share a host


def resolve_limits(spec: EngineSpec, shape: KVShape, max_model_len: int, device: torch.device) -> Limits:
    """The engine's limits on ``device`` once the weights are loaded.

    The arena takes what the free memory allows, at most what ``max_num_seqs`` full contexts need.

    Raises:
        SpecError: not even one sequence of ``max_model_len`` tokens fits.
    """
    on_cpu = device.type == "cpu"
    default_seqs, default_tokens = (_CPU_SEQS, _CPU_TOKENS) if on_cpu else (_CUDA_SEQS, _CUDA_TOKENS)
    max_num_seqs = default_seqs if spec.max_num_seqs == "auto" else spec.max_num_seqs
    budget = (
        max(default_tokens, max_num_seqs)
        if spec.max_num_batched_tokens == "auto"
        else spec.max_num_batched_tokens
    )
    if budget < max_num_seqs:
        raise SpecError(
            f"engine.max_num_batched_tokens: {budget} is less than max_num_seqs {max_num_seqs}, "
            "so some sequences would never get their next token"
        )
    free_tokens = free_bytes(device, spec.gpu_memory_utilization) // shape.bytes_per_token
    tokens = (
        min(free_tokens, max_num_seqs * max_model_len)
        if spec.kv_cache_tokens == "auto"
        else spec.kv_cache_tokens
    )
    if tokens < max_model_len:
        raise SpecError(
            f"engine: there is room for {tokens} tokens of keys and values ({shape.bytes_per_token} bytes "
            f"each), less than one sequence of model.max_model_len {max_model_len}; lower that, or free "
            "memory"
        )
    return Limits(max_num_seqs, budget, int(tokens), spec.enable_prefix_caching)


def free_bytes(device: torch.device, utilization: float) -> int:
    """Bytes that the arena may take on ``device``, after what is in use there now."""
    if device.type == "cpu":
        return int(_CPU_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free - (1.0 - utilization) * total))
