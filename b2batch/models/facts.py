"""What a checkpoint's config says of the model, for people; no weight is read and torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from b2batch.models.checkpoint import Checkpoint, open_checkpoint
from b2batch.models.families import MODELS, PromptCodec, family_of, has_norm_head
from b2batch.models.footprint import BYTES_OF_DTYPE, Architecture, kv_bytes_per_token, weight_bytes
from b2batch.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's architecture. ``num_parameters`` is computed for a gated decoder without biases, so it is
    exact for Baichuan and close for others; KV bytes are those of one token. Weights and KV are at the
    dtype that a GPU would run (``model.dtype``, else the checkpoint's) and quantised as the spec asks.
    """

    source: str
    model_type: str
    variant: str
    is_chat: bool
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_model_len: int
    num_parameters: int
    dtype: str
    kv_bytes_per_token: int
    weight_bytes: int
    quantization: str | None


def find_facts(spec: ModelSpec) -> ModelFacts:
    """The facts of the model that ``spec`` names; a hub is asked for its small files only.

    Raises:
        ModelError: there is no such checkpoint, or it is malformed.
    """
    checkpoint = open_checkpoint(spec, weights=False)
    return model_facts(checkpoint, family_of(checkpoint).codec(checkpoint, spec), spec)


def model_facts(checkpoint: Checkpoint, codec: PromptCodec, spec: ModelSpec) -> ModelFacts:
    """The facts of an opened checkpoint, as the engine would run it."""
    config = checkpoint.config.get("text_config", checkpoint.config)
    num_heads = int(config["num_attention_heads"])
    shape = Architecture.of(checkpoint.config)
    dtype = gpu_dtype(checkpoint, spec)
    quantization = checkpoint.quantization or spec.quantization
    return ModelFacts(
        source=checkpoint.source,
        model_type=checkpoint.model_type,
        variant=_variant(checkpoint, spec),
        is_chat=codec.chat is not None,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        vocab_size=shape.vocab_size,
        max_model_len=codec.max_model_len,
        num_parameters=shape.num_linear_parameters + shape.num_other_parameters,
        dtype=dtype,
        kv_bytes_per_token=kv_bytes_per_token(shape, dtype),
        weight_bytes=weight_bytes(shape, dtype, quantization),
        quantization=quantization,
    )


def gpu_dtype(checkpoint: Checkpoint, spec: ModelSpec) -> str:
    """The dtype that the weights get on a GPU; float32 where the spec asks for a CPU."""
    if spec.dtype != "auto":
        return spec.dtype
    if spec.device == "cpu":
        return "float32"
    declared = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16")
    return declared if declared in BYTES_OF_DTYPE else "bfloat16"


def _variant(checkpoint: Checkpoint, spec: ModelSpec) -> str:
    if checkpoint.model_type not in MODELS:
        return "transformers' own class"
    config = checkpoint.config
    norm_head: Any = config.get("norm_head") if spec.norm_head == "auto" else spec.norm_head
    if norm_head is None:
        norm_head = has_norm_head(int(config["vocab_size"]), config.get("architectures"))
    position: Any = config.get("position") if spec.position == "auto" else spec.position
    if position is None:
        position = "alibi" if config.get("max_position_embeddings") is None else "rope"
    generation = "Baichuan 2, normalised head" if norm_head else "Baichuan 1, plain head"
    return f"{generation}, {'ALiBi' if position == 'alibi' else 'rotary'} positions"
