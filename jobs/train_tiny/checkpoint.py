"""The model directory, laid out as Baichuan 2's are on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
from safetensors.torch import load_file, save_file

from .network import Network, NetworkSize
from .tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, UNK_ID, USER_ID

_SPECIAL_IDS = {"pad_token_id": UNK_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def save_checkpoint(directory: Path, network: Network, size: NetworkSize, tokenizer_model: bytes) -> None:
    """Write weights in bfloat16, tokenizer and configuration into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.bfloat16().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.model").write_bytes(tokenizer_model)
    for name, content in _configuration(size).items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def load_checkpoint(directory: Path) -> tuple[Network, sentencepiece.SentencePieceProcessor]:
    """Read a directory that ``save_checkpoint`` wrote; the weights become float32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    network = Network(_size(config))
    network.load_state_dict({k: v.float() for k, v in load_file(directory / "model.safetensors").items()})
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return network.eval(), tokenizer


def _size(config: dict[str, Any]) -> NetworkSize:
    return NetworkSize(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        max_positions=config["max_position_embeddings"],
    )


def _configuration(size: NetworkSize) -> dict[str, dict[str, Any]]:
    return {
        "config.json": _model_config(size),
        "generation_config.json": _generation_config(),
        "tokenizer_config.json": _tokenizer_config(size),
        "special_tokens_map.json": {name: _token(text) for name, text in _SPECIAL_TOKENS.items()},
    }


def _model_config(size: NetworkSize) -> dict[str, Any]:
    return {
        "architectures": ["BaichuanForCausalLM"],
        "model_type": "baichuan",
        "tokenizer_class": "BaichuanTokenizer",
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "model_max_length": size.max_positions,
        "max_position_embeddings": size.max_positions,
        **_SPECIAL_IDS,
        "tie_word_embeddings": False,
        "use_cache": True,
        "z_loss_weight": 0,
        "torch_dtype": "bfloat16",
        "_from_model_config": True,
    }


def _generation_config() -> dict[str, Any]:
    return {
        **_SPECIAL_IDS,
        "user_token_id": USER_ID,
        "assistant_token_id": ASSISTANT_ID,
        "max_new_tokens": 8,
        "do_sample": False,
        "temperature": 0.3,
        "top_k": 5,
        "top_p": 0.85,
        "repetition_penalty": 1.0,
    }


def _tokenizer_config(size: NetworkSize) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": size.max_positions,
        "tokenizer_class": "BaichuanTokenizer",
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
        **_SPECIAL_TOKENS,
    }


def _token(text: str) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
