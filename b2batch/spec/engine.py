"""The ``engine`` section of a job file: what a replica's engine may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from b2batch.spec.section import Section


class EngineSpec(Section):
    """What a replica's engine may use. ``auto`` measures what memory is there, and which steps are fast."""

    max_num_seqs: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    max_num_batched_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=64, description="processes of a CPU replica that share a Baichuan's layers"
    )
