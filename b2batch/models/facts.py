"""What a checkpoint's config says of the model, for people; no weight is read and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from b2batch.models.checkpoint import Checkpoint, open_checkpoint
from b2batch.models.families import MODELS, PromptCodec, family_of, has_norm_head
from b2batch.spec import ModelSpec

_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model's architecture. ``num_parameters`` is computed for a gated decoder without biases, so it is
    exact for Baichuan and close for others; KV bytes are those of one token at the checkpoint's dtype.
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
    num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // num_heads)
    num_layers = int(config["num_hidden_layers"])
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return ModelFacts(
        source=checkpoint.source,
        model_type=checkpoint.model_type,
        variant=_variant(checkpoint, spec),
        is_chat=codec.chat is not None,
        num_layers=num_layers,
        hidden_size=int(config["hidden_size"]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=int(config["vocab_size"]),
        max_model_len=codec.max_model_len,
        num_parameters=_num_parameters(config, num_heads * head_dim, num_kv_heads * head_dim),
        dtype=dtype,
        kv_bytes_per_token=2 * num_layers * num_kv_heads * head_dim * _BYTES_OF_DTYPE.get(dtype, 2),
        quantization=checkpoint.quantization,
    )


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


def _num_parameters(config: Mapping[str, Any], query_size: int, kv_size: int) -> int:
    hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    attention = hidden * (2 * query_size + 2 * kv_size)
    gated = 3 * hidden * int(config.get("intermediate_size") or 4 * hidden)
    norms = 2 * hidden
    heads = 1 if config.get("tie_word_embeddings") else 2
    return heads * vocab * hidden + int(config["num_hidden_layers"]) * (attention + gated + norms) + hidden
