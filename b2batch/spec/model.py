"""The ``model`` section of a job file: which checkpoint, and how it is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from b2batch.spec.section import Location, Section


class ModelSpec(Section):
    """Which checkpoint, and how it is read.

    ``position`` and ``norm_head`` override what a Baichuan config does not say (see
    ``models/baichuan.py``); other families ignore neither silently: they refuse them.
    """

    model: Location = Field(
        description="hub id, local path, ms://… (ModelScope), or a name from configs/models"
    )
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "int8", "int8-dynamic"] | None = Field(
        default=None, description="of linear layers; a quantised checkpoint is recognised by itself"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="what nf4 layers compute in"
    )
    head_dtype: Literal["float32", "auto"] = Field(
        default="float32", description="what logits are computed in; auto: the weights' dtype"
    )
    adapter: Location | None = Field(default=None, description="a LoRA adapter of peft: hub id or local path")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1, description="tokens of prompt and answer")
    position: Literal["auto", "rope", "alibi"] = "auto"
    norm_head: Literal["auto"] | bool = "auto"
