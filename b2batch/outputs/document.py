"""The small JSON documents of an output directory: readable, key-sorted, and never trusted blindly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from b2batch.errors import IntegrityError
from b2batch.outputs.store import Store


def encode_document(value: Mapping[str, Any]) -> bytes:
    """``value`` as indented UTF-8 JSON; equal values give equal bytes."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1)
    # A path with bytes that are not UTF-8 holds lone surrogates; written as \udcXX they stay valid JSON.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def read_document(store: Store, key: str) -> dict[str, Any]:
    """The document at ``key``.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is not a JSON object.
    """
    try:
        value = json.loads(store.read(key))
    except ValueError as error:
        raise IntegrityError(f"{store.uri}/{key} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise IntegrityError(f"{store.uri}/{key} is damaged: expected a JSON object")
    return value
