"""A checkpoint's configs, checked where they enter: each value has the type that it is read as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from b2batch.errors import ModelError


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_Rule = tuple[Callable[[Any], bool], str]
_SIZE: _Rule = (_is_size, "a positive integer")
_ID: _Rule = (_is_id, "a token id")
_IDS: _Rule = (
    lambda value: all(map(_is_id, value)) if isinstance(value, list) else _is_id(value) or value == -1,
    "a token id, or a list of them",
)
_TEXT: _Rule = (lambda value: isinstance(value, str), "text")
_TEXTS: _Rule = (
    lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "a list of names",
)
_SECTION: _Rule = (_is_mapping, "an object")

_RULES: dict[str, _Rule] = {
    "model_type": _TEXT,
    "architectures": _TEXTS,
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": _SIZE,
    "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE,
    "max_position_embeddings": _SIZE,
    "model_max_length": _SIZE,
    "text_config": _SECTION,
    "quantization_config": _SECTION,
    "eos_token_id": _IDS,
    "user_token_id": _ID,
    "assistant_token_id": _ID,
}


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` or ``generation_config.json`` with a value of the wrong type; null is none.

    Raises:
        ModelError: names the file, the key, what was found and what is expected.
    """
    _check(str(path), config)
    if config.get("text_config"):
        _check(f"{path}: text_config", config["text_config"])
    if ("user_token_id" in config) != ("assistant_token_id" in config):
        raise ModelError(f"{path}: user_token_id and assistant_token_id go together; only one is there")


def _check(where: str, config: Mapping[str, Any]) -> None:
    for key, (is_valid, expected) in _RULES.items():
        value = config.get(key)
        if value is not None and not is_valid(value):
            raise ModelError(f"{where}: {key}: expected {expected}, found {str(value)[:80]!r}")
