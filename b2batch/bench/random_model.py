"""Baichuan 2 shapes with random weights: the real ones for a GPU, about 100 M parameters for a CPU.

Speed depends on shapes, not on what the weights say, so nothing needs to be downloaded.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from b2batch.bench.prompts import WORDS
from b2batch.models.baichuan import BaichuanConfig, BaichuanForCausalLM

_ROLE_IDS = 2  # the last ids of the vocabulary open the user's and the assistant's turns
_NUM_PIECES = 512


@dataclass(frozen=True, slots=True)
class _Shape:
    """Sizes of one model. 7B is rotary, 13B uses ALiBi with a number of heads that is no power of two."""

    position: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    max_len: int


_SHAPES = {
    ("random-7b", "cuda"): _Shape("rope", 4096, 11_008, 32, 32, 125_696, 4096),
    ("random-13b", "cuda"): _Shape("alibi", 5120, 13_696, 40, 40, 125_696, 4096),
    ("random-7b", "cpu"): _Shape("rope", 768, 2048, 8, 12, 32_000, 4096),
    ("random-13b", "cpu"): _Shape("alibi", 640, 1728, 12, 10, 32_000, 4096),
    ("random-tiny", "cpu"): _Shape("rope", 64, 128, 2, 4, 1024, 4096),
}
RANDOM_MODELS = tuple(dict.fromkeys(name for name, _ in _SHAPES))


def run(document: Mapping[str, Any]) -> dict[str, Any]:
    """Build ``name`` for ``device`` in ``directory``; the entry of the child process."""
    num_parameters = build(
        document["name"], document["device"], document["dtype"], Path(document["directory"])
    )
    return {"num_parameters": num_parameters}


def build(name: str, device: str, dtype: str, directory: Path) -> int:
    """Write a checkpoint that loads like any other; return its number of parameters."""
    shape = _SHAPES[name, device]
    config = BaichuanConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        max_position_embeddings=shape.max_len if shape.position == "rope" else None,
        model_max_length=shape.max_len,
        position=shape.position,
        norm_head=True,
        dtype=dtype,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # so that 13 B parameters are never made in float32
    try:
        with torch.device(device):
            model = BaichuanForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(directory)
    _write_tokenizer(directory)
    _write_generation_config(directory, shape)
    return sum(weight.numel() for weight in model.parameters())


def _write_tokenizer(directory: Path) -> None:
    """A vocabulary of the made-up prompts' words, so that a word is about a token."""
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*WORDS, " ".join(WORDS)]),
        model_writer=trained,
        vocab_size=_NUM_PIECES,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(trained.getvalue())


def _write_generation_config(directory: Path, shape: _Shape) -> None:
    settings = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "user_token_id": shape.vocab_size - _ROLE_IDS,
        "assistant_token_id": shape.vocab_size - 1,
    }
    (directory / "generation_config.json").write_text(json.dumps(settings))
