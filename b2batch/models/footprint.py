"""How much memory a model takes, from its config alone: weights, keys and values, one step's work.

    weights     linear layers at their own width, embeddings, head and norms at the dtype's
    KV          2 · layers · key heads · head size, a token
    workspace   activations of the largest step, and the logits with the copies that sampling makes
    graphs      what CUDA graphs of decoding keep for themselves

Counted for a gated decoder without biases: exact for Baichuan, close for other families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}

_BLOCK, _BLOCKS_OF_NESTED = 64, 256  # of nf4: weights a scale, scales a scale of scales
_GRAPH_LOGITS, _GRAPH_PARTS = 3, 36  # parts: 2 of a row, 3 kinds of prefix room, all buckets 6 × the largest
_LOGIT_COPIES = 4  # the logits, what penalties and temperature make of them, a sorted copy, its sums


@dataclass(frozen=True, slots=True)
class Architecture:
    """The sizes that memory depends on."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int  # heads · head size
    kv_size: int  # key heads · head size
    vocab_size: int
    is_tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Architecture:
        """From a checkpoint's ``config.json``."""
        text = config.get("text_config", config)
        hidden, num_heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        head_dim = int(text.get("head_dim") or hidden // num_heads)
        return cls(
            num_layers=int(text["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(text.get("intermediate_size") or 4 * hidden),
            query_size=num_heads * head_dim,
            kv_size=int(text.get("num_key_value_heads") or num_heads) * head_dim,
            vocab_size=int(text["vocab_size"]),
            is_tied=bool(text.get("tie_word_embeddings")),
        )

    @property
    def num_linear_parameters(self) -> int:
        """Of the decoder's linear layers, which quantisation makes smaller."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_other_parameters(self) -> int:
        """Embeddings, head and norms."""
        tables = 1 if self.is_tied else 2
        norms = (2 * self.num_layers + 1) * self.hidden_size
        return tables * self.vocab_size * self.hidden_size + norms

    @property
    def num_linear_rows(self) -> int:
        """Output features of all linear layers: int8 keeps a scale for each."""
        attention = 2 * self.kv_size + self.query_size + self.hidden_size
        return self.num_layers * (attention + 2 * self.intermediate_size + self.hidden_size)


def head_bytes(shape: Architecture, dtype: str) -> int:
    """Bytes of the head, and as many of the embeddings."""
    return shape.vocab_size * shape.hidden_size * BYTES_OF_DTYPE[dtype]


@dataclass(frozen=True, slots=True)
class Stage:
    """What one device has of a model that is spread over several."""

    num_layers: int
    weight_bytes: int


def stages(shape: Architecture, dtype: str, quantization: str | None, num_devices: int) -> list[Stage]:
    """Each device's part: embeddings on the first, the head on the last, so that the fullest holds little.

    accelerate's "balanced" fills device after device up to a layer and a quarter beyond its share: of a 7B
    over four it puts 4.9 GB on two, and leaves 1.4 GB to the last.
    """
    table = head_bytes(shape, dtype)
    held, counts = [0] * num_devices, [0] * num_devices
    held[0] += table
    held[-1] += 0 if shape.is_tied else table
    layer = (weight_bytes(shape, dtype, quantization) - sum(held)) // shape.num_layers
    for _ in range(shape.num_layers):
        emptiest = held.index(min(held))
        held[emptiest] += layer
        counts[emptiest] += 1
    return [Stage(count, total) for count, total in zip(counts, held, strict=True)]


def weight_bytes(shape: Architecture, dtype: str, quantization: str | None) -> int:
    """Bytes of all weights; ``quantization`` as in a job."""
    linear, width = shape.num_linear_parameters, BYTES_OF_DTYPE[dtype]
    others = shape.num_other_parameters * width
    match quantization:
        case "nf4":
            scales = linear // _BLOCK
            return others + linear // 2 + scales + 4 * (scales // _BLOCKS_OF_NESTED)
        case "int8" | "int8-dynamic":
            return others + linear + 4 * shape.num_linear_rows
        case _:
            return others + linear * width


def _activation_bytes(shape: Architecture, dtype: str) -> int:
    """Of one token, in the widest place of a layer.

    Attention holds the residual, its norm, q, k, v and their float32 copies for the rotation; the
    feed-forward the residual, its norm and three intermediates; then one of the two is gone.
    """
    width = BYTES_OF_DTYPE[dtype]
    projected = shape.query_size + 2 * shape.kv_size
    attention = 3 * width * shape.hidden_size + width * projected + 16 * shape.query_size
    return max(attention, 2 * width * shape.hidden_size + 3 * width * shape.intermediate_size)


def workspace_bytes(shape: Architecture, dtype: str, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Bytes beside weights and KV that the largest step needs."""
    logits = _LOGIT_COPIES * 4 * max_num_seqs * shape.vocab_size
    return max_num_batched_tokens * _activation_bytes(shape, dtype) + logits


def graph_bytes(shape: Architecture, dtype: str, max_num_seqs: int) -> int:
    """Bytes that recorded decode steps keep; the smaller graphs reuse the pool of the largest.

    The logits where they are left, the product and what the head makes of it; activations; and of each
    shape of step the parts of attention, whose rows add up to some times those of the largest.
    """
    logits = _GRAPH_LOGITS * 4 * max_num_seqs * shape.vocab_size
    parts = _GRAPH_PARTS * 4 * max_num_seqs * shape.query_size
    return logits + parts + max_num_seqs * _activation_bytes(shape, dtype)


def kv_bytes_per_token(shape: Architecture, dtype: str) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.num_layers * shape.kv_size * BYTES_OF_DTYPE[dtype]
