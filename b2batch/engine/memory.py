"""How large the engine's limits may be: ``auto`` settings → numbers, from the memory that is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import psutil
import torch
from transformers import PreTrainedModel

from b2batch.engine.memory_plan import GB, MemoryPlan, StepSize
from b2batch.engine.runner import KVShape, layer_devices
from b2batch.engine.scheduler import Limits
from b2batch.errors import ModelError, SpecError
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.families import family_of
from b2batch.models.footprint import Architecture, graph_bytes, workspace_bytes
from b2batch.models.loading import pick_device, pick_dtype, refuse_missing_gpus
from b2batch.spec import EngineSpec, JobSpec

_CPU_SHORTAGES = ("DefaultCPUAllocator: ", "could not create a primitive", "could not execute a primitive")
_CPU_SHARE = 0.2  # of the memory that is free: several replicas may share a host


def refuse_too_large(spec: JobSpec) -> None:
    """Before minutes of loading: ModelError if the model and one sequence do not fit the device here."""
    device = pick_device(spec.model)
    refuse_missing_gpus(spec.model, spec.cluster.gpus_per_model)
    if device.type == "cuda" and spec.engine.tensor_parallel_size > 1:
        raise SpecError(
            "engine.tensor_parallel_size: only CPU replicas are split over processes in this version, and "
            "this one is on a GPU; cluster.gpus_per_replica spreads a model over several"
        )
    checkpoint = open_checkpoint(spec.model, weights=False)
    dtype = str(pick_dtype(spec.model, checkpoint, device)).removeprefix("torch.")
    max_model_len = family_of(checkpoint).codec(checkpoint, spec.model).max_model_len
    plan = replace(MemoryPlan.of(spec, checkpoint, max_model_len), dtype=dtype)
    free = min(_free_bytes(each) for each in _devices(device, plan.num_devices))
    if device.type == "cpu":
        fits, advice = plan.weight_bytes + plan.kv_bytes_per_token * max_model_len <= free, "does not fit"
    else:
        fits, advice = plan.on(free).fits, plan.on(free).advice
    if not fits:
        raise ModelError(
            f"{checkpoint.source} in {dtype}: {plan.weight_bytes / GB:.1f} GB of weights, "
            f"{plan.kv_bytes_per_token * max_model_len / GB:.1f} GB of keys and values for one sequence of "
            f"{max_model_len} tokens; {_named(device, plan.num_devices)} {free / GB:.1f} GB free: {advice}"
        )


def _devices(device: torch.device, num_devices: int) -> list[torch.device]:
    return [device] if num_devices == 1 else [torch.device(device.type, i) for i in range(num_devices)]


def _named(device: torch.device, num_devices: int) -> str:
    return f"{device.type} has" if num_devices == 1 else f"each of {num_devices} {device.type} devices has"


def resolve_limits(
    spec: EngineSpec, model: PreTrainedModel, max_model_len: int, device: torch.device
) -> Limits:
    """The engine's limits on ``device`` once the weights are loaded, measured there.

    The arena takes what the free memory allows, at most what ``max_num_seqs`` full contexts need.

    Raises:
        SpecError: not even one sequence of ``max_model_len`` tokens fits.
    """
    on_cpu = device.type == "cpu"
    step = StepSize.of(spec, on_cpu=on_cpu)
    max_num_seqs, budget = step.max_num_seqs, step.max_num_batched_tokens
    shape = KVShape.of(model)
    free_tokens = min(  # the device with the least room for the keys and values of its layers
        arena_bytes(spec, model, step, place) // (num_layers * shape.bytes_per_layer)
        for place, num_layers in Counter(layer_devices(model)).items()
    )
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


def arena_bytes(spec: EngineSpec, model: PreTrainedModel, step: StepSize, device: torch.device) -> int:
    """Bytes that keys and values may take of what is free now and not needed for a step's work."""
    free = _free_bytes(device)
    if device.type == "cpu":
        return int(_CPU_SHARE * free)
    shape = Architecture.of(model.config.get_text_config().to_dict())
    dtype = str(model.dtype).removeprefix("torch.")
    work = workspace_bytes(shape, dtype, step.max_num_seqs, step.max_num_batched_tokens)
    if len(set(layer_devices(model))) == 1:
        work += graph_bytes(shape, dtype, step.max_num_seqs)
    return max(0, int((free - work) * spec.gpu_memory_utilization))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a step failed for want of memory: CUDA's own error, or what torch's CPU allocator says.

    oneDNN does not say why it could not make or run a product. The same products ran when the engine was
    checked, on fewer rows, so that it is for memory.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_SHORTAGES)
