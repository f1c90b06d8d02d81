"""How a replica's engine comes to be: its model loaded, made fast for the device, checked, and measured.

    load ──► the model's own logits ──► pack, fuse ──► the same logits? ──► how large a step pays ──► engine
                                                        no: refused

The arena comes last, so that it may take all the memory that is left.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from b2batch.engine import guard, lockstep, packing
from b2batch.engine.calibration import Calibration
from b2batch.engine.cpu_layers import fuse_layers
from b2batch.engine.engine import Engine
from b2batch.engine.heap import keep_freed_memory, return_freed_memory
from b2batch.engine.memory import refuse_too_large, resolve_limits
from b2batch.models.loading import LoadedModel, load_model
from b2batch.models.sharding import shard
from b2batch.spec import EngineSpec, JobSpec

logger = logging.getLogger(__name__)


def start_engine(spec: JobSpec) -> tuple[LoadedModel, Engine]:
    """Load the model and make a replica's engine, with the other processes that it is split over.

    Raises:
        CallerError: the checkpoint or the spec cannot be used here.
    """
    num_ranks = spec.engine.tensor_parallel_size
    _place_threads(spec)
    refuse_too_large(spec)
    if num_ranks > 1:
        lockstep.start_followers(num_ranks, follow, spec)
    loaded = load_part(spec, rank=0)
    return loaded, make_engine(spec, loaded, calibrates=True)


def load_part(spec: JobSpec, rank: int) -> LoadedModel:
    """The model, or what the process ``rank`` of a split replica has of it."""
    return_freed_memory()
    loaded = load_model(spec.model, spec.cluster.gpus_per_model)
    if spec.engine.tensor_parallel_size > 1:
        shard(loaded.model, rank, spec.engine.tensor_parallel_size)
    return loaded


def follow(rank: int, num_ranks: int, store: Path, spec: JobSpec) -> None:
    """The life of a process that has a part of the replica's model."""
    _place_threads(spec)
    lockstep.join(rank, num_ranks, store)
    lockstep.repeat_forever(make_engine(spec, load_part(spec, rank), Engine))


def _place_threads(spec: JobSpec) -> None:
    torch.set_num_threads(max(1, int(spec.cluster.cpus_per_replica / spec.engine.tensor_parallel_size)))


def make_engine(
    spec: JobSpec,
    loaded: LoadedModel,
    engine_class: type[Engine] | None = None,
    *,
    calibrates: bool = False,
) -> Engine:
    """An engine for a loaded model, with its limits settled and its arithmetic checked.

    In a replica of several processes it leads the others, unless a class is given. With ``calibrates``
    what is ``auto`` of a step's size is settled by timing a few.

    Raises:
        CallerError: the engine cannot run the model, or has no room for one sequence.
    """
    is_split = spec.engine.tensor_parallel_size > 1
    if spec.engine.kv_cache_dtype != "auto":
        loaded.model.kv_cache_dtype = getattr(torch, spec.engine.kv_cache_dtype)
    _prepare(spec, loaded)
    settings = _calibrated(spec, loaded) if calibrates else spec.engine
    device = next(loaded.model.parameters()).device
    limits = resolve_limits(settings, loaded.model, loaded.codec.max_model_len, device)
    if is_split:
        limits = lockstep.agree(limits)
    logger.info(
        "engine ready: %d sequences, %d tokens a step, %d tokens of KV",
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.kv_cache_tokens,
    )
    codec, vocab_size = loaded.codec, loaded.model.config.get_text_config().vocab_size
    return (engine_class or (lockstep.LeadingEngine if is_split else Engine))(
        loaded.model,
        limits,
        max_model_len=codec.max_model_len,
        stop_token_ids=codec.stop_token_ids,
        decode=codec.tokenizer.decode,
        make_vocabulary=partial(codec.tokenizer.grammar_vocabulary, vocab_size, codec.stop_token_ids),
        runs_ahead=device.type == "cuda" and not is_split,
    )


def _prepare(spec: JobSpec, loaded: LoadedModel) -> None:
    """Make the model's arithmetic that of the engine on this device; ModelError if its numbers change."""
    model = loaded.model
    is_int8 = spec.model.quantization == "int8-dynamic"
    guard.refuse_windows(model, loaded.codec.max_model_len)
    if is_int8:
        packing.refuse_int8(model)
    expected = guard.reference_logits(model)
    if packing.can_pack(model) and not is_int8:
        packing.pack_linears(model)
    if next(model.parameters()).is_cpu:
        keep_freed_memory()
        fuse_layers(model)
    guard.check_model(model, expected)
    if is_int8:  # after the check, whose tolerance is that of exact products
        packing.pack_linears(model, int8=True)


def _calibrated(spec: JobSpec, loaded: LoadedModel) -> EngineSpec:
    """``spec.engine`` with what a trial found, where one is wanted: only answers are decoded."""
    device = next(loaded.model.parameters()).device
    calibration = Calibration(loaded.model, loaded.codec.max_model_len, device)
    if spec.task != "generate" or not calibration.is_wanted(spec.engine):
        return spec.engine
    return calibration.settle(spec.engine)
