"""OpenAI batch files: JSON Lines of ``/v1/chat/completions`` and ``/v1/completions`` requests.

Carried are ``custom_id``, ``url`` and ``body`` (as JSON text). To render and sample a row, ``body`` is
its messages or its text, ``sampling`` its keys in this project's names, and ``json_schema`` what
``response_format`` asks for. A line that asks for what cannot be done is a row with its failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from b2batch.errors import RowError, RowFailure, RowFault, Stage
from b2batch.inputs import jsonl
from b2batch.inputs.files import FoundFile, InputFile
from b2batch.inputs.jsonl import JsonlRows
from b2batch.inputs.lines import Line
from b2batch.inputs.reader import WHOLE, FilePart, FileScan
from b2batch.inputs.strict_json import to_json
from b2batch.rows import PromptRow
from b2batch.spec import InputSpec

SCHEMA = pa.schema({"custom_id": pa.string(), "url": pa.string(), "body": pa.string()})
CHAT_URL = "/v1/chat/completions"
TEXT_URL = "/v1/completions"
_SAMPLING_KEYS = {
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "n": "n",
    "stop": "stop",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
}
_OTHER_KEYS = {"model", "messages", "prompt", "response_format", "logprobs", "top_logprobs"}
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "stream", "safety_identifier"}


def scan(file: FoundFile, spec: InputSpec, answer_tokens: int, part: FilePart = WHOLE) -> FileScan:
    """Find rows, units and fingerprint in one pass; the columns are always the same."""
    uninferred = spec.model_copy(update={"infer_rows": 0})
    return replace(jsonl.scan(file, uninferred, answer_tokens, part), schema=SCHEMA)


def open_rows(file: InputFile, schema: pa.Schema, spec: InputSpec) -> BatchRows:
    """Open a planned batch file."""
    return BatchRows(file, schema, spec)


class BatchRows(JsonlRows):
    """An open batch file; see ``OpenRows``. A row that fails keeps its ``custom_id`` where it has one."""

    def _read_row(self, line: Line, line_number: int, row_id: str) -> tuple[PromptRow, dict[str, Any]]:
        stored: dict[str, Any] = {}
        try:
            record = self._parse(line)
            stored = _stored(record)
            columns = {**stored, **_request(record)}
        except RowError as error:
            message = f"{self._file.path}, line {line_number}: {error}"
            failure = RowFailure(error.failure.fault, message[:2000], Stage.READ)
            return PromptRow(row_id, line.row_hash, {}, failure), stored
        return PromptRow(row_id, line.row_hash, columns), stored


def _stored(record: Mapping[str, Any]) -> dict[str, Any]:
    texts = {name: record.get(name) for name in ("custom_id", "url")}
    stored = {name: value if isinstance(value, str) else None for name, value in texts.items()}
    body = record.get("body")
    return {**stored, "body": to_json(body) if isinstance(body, dict) else None}


def _request(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a line asks for; RowError names the key that is wrong."""
    if not isinstance(record.get("custom_id"), str):
        raise _refused("custom_id: expected text")
    if record.get("method", "POST") != "POST":
        raise _refused("method: expected POST")
    url, body = record.get("url"), record.get("body")
    if not isinstance(body, dict):
        raise _refused("body: expected an object")
    if url not in (CHAT_URL, TEXT_URL):
        raise _refused(f"url: expected {CHAT_URL} or {TEXT_URL}, found {url!r}")
    _check_keys(body)
    sampling = {ours: body[key] for key, ours in _SAMPLING_KEYS.items() if body.get(key) is not None}
    sampling |= _logprobs(body, is_chat=url == CHAT_URL)
    return {
        "body": _messages(body.get("messages")) if url == CHAT_URL else _text(body.get("prompt")),
        "sampling": sampling,
        "json_schema": _json_schema(body.get("response_format")),
    }


def _check_keys(body: Mapping[str, Any]) -> None:
    known = _SAMPLING_KEYS.keys() | _OTHER_KEYS | _WITHOUT_EFFECT
    unknown = sorted(key for key, value in body.items() if key not in known and value is not None)
    if unknown:
        raise _refused(f"body.{unknown[0]}: not supported")
    if body.get("stream"):
        raise _refused("body.stream: a batch is not streamed")


def _logprobs(body: Mapping[str, Any], *, is_chat: bool) -> dict[str, Any]:
    wanted = body.get("logprobs")
    if wanted is None or wanted is False:
        return {}
    if not is_chat:
        return {"logprobs": wanted}
    if wanted is not True:
        raise _refused("body.logprobs: expected true or false")
    return {"logprobs": body.get("top_logprobs") or 0}


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _refused("body.messages: expected a list of messages")
    return [_message(message, f"body.messages[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise _refused(f"{where}: expected an object with role and content")
    content = value.get("content")
    if isinstance(content, list):
        if any(not isinstance(p, dict) or not isinstance(p.get("text"), str) for p in content):
            raise _refused(f"{where}.content: only parts of text can be read")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _refused(f"{where}.content: expected text")
    return {"role": "system" if value["role"] == "developer" else value["role"], "content": content}


def _text(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise _refused("body.prompt: expected one text")
    return value


def _json_schema(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = (value.get("json_schema") or {}).get("schema") if isinstance(value, dict) else None
    if kind != "json_schema" or not isinstance(schema, dict):
        raise _refused("body.response_format: expected text, json_object, or json_schema with its schema")
    return schema


def _refused(message: str) -> RowError:
    return RowError(RowFault.INPUT_SCHEMA, message, Stage.READ)
