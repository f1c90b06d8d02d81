"""A finished output as OpenAI batch output and error files.

Each row becomes one line with its ``custom_id``, in the output's order: a response in the one file, or
an error in the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import pyarrow.parquet as pq

from b2batch.errors import OutputError
from b2batch.inputs.openai_batch import CHAT_URL
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.families import family_of
from b2batch.models.tokenizer import Tokenizer
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import own_name
from b2batch.outputs.store import open_store
from b2batch.spec import JobSpec, parse_spec


@dataclass(frozen=True, slots=True)
class Exported:
    """How many lines went where."""

    num_responses: int
    num_errors: int


def export_openai(path: str, responses: TextIO, errors: TextIO, *, created_s: int) -> Exported:
    """Write the lines of the finished run at ``path``.

    Args:
        created_s: the Unix time that each response gives as its ``created``.

    Raises:
        OutputError: the output is not finished, or not of OpenAI batch lines.
    """
    store = open_store(path)
    directory = RunDirectory.existing(store)
    spec = parse_spec(directory.record.spec)
    success = directory.success()
    if not spec.has_batch_lines:
        raise OutputError(f"{path}: was not made from input.format: openai-batch")
    if success is None:
        raise OutputError(f"{path}: the run is not finished; the same run command goes on")
    writer = _LineWriter(spec, directory.record.run8, created_s)
    num_lines = {True: 0, False: 0}
    for row in _rows(directory, sorted(success.parts)):
        is_error = row["status"] == "error"
        (errors if is_error else responses).write(writer.line(row) + "\n")
        num_lines[is_error] += 1
    return Exported(num_lines[False], num_lines[True])


def _rows(directory: RunDirectory, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All rows, own columns by their names without a prefix."""
    for name in names:
        with directory.store.open(name) as file:
            table = pq.ParquetFile(file).read(use_threads=False)  # see read_parquet
        names_there = [own_name(field) or field.name for field in table.schema]
        yield from table.rename_columns(names_there).to_pylist()


class _LineWriter:
    def __init__(self, spec: JobSpec, run8: str, created_s: int) -> None:
        self._run8 = run8
        self._created_s = created_s
        self._tokenizer = _tokenizer_of(spec)

    def line(self, row: Mapping[str, Any]) -> str:
        """The JSON of a row's line, without its end."""
        is_error = row["status"] == "error"
        document = {
            "id": f"batch_req_{self._id(row)}",
            "custom_id": row["custom_id"],
            "response": None if is_error else self._response(row),
            "error": _error(row["error"]) if is_error else None,
        }
        return json.dumps(document, ensure_ascii=False)

    def _id(self, row: Mapping[str, Any]) -> str:
        return f"{self._run8}_{row['row_id'].replace(':', '_')}"

    def _response(self, row: Mapping[str, Any]) -> dict[str, Any]:
        request = json.loads(row["body"])
        is_chat = row["url"] == CHAT_URL
        body = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self._id(row)}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": self._created_s,
            "model": request.get("model") or "unnamed",
            "choices": [
                self._choice(i, sample, row["logprobs"] if i == 0 else None, is_chat)
                for i, sample in enumerate(row["samples"])
            ],
            "usage": {
                "prompt_tokens": row["num_input_tokens"],
                "completion_tokens": row["num_generated_tokens"],
                "total_tokens": row["num_input_tokens"] + row["num_generated_tokens"],
            },
        }
        return {"status_code": 200, "request_id": self._id(row), "body": body}

    def _choice(
        self, index: int, sample: Mapping[str, Any], logprobs: list[Any] | None, is_chat: bool
    ) -> dict[str, Any]:
        common = {"index": index, "finish_reason": sample["finish_reason"]}
        if is_chat:
            message = {"role": "assistant", "content": sample["text"], "refusal": None}
            return {**common, "message": message, "logprobs": logprobs and self._chat_logprobs(logprobs)}
        return {**common, "text": sample["text"], "logprobs": logprobs and self._text_logprobs(logprobs)}

    def _chat_logprobs(self, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        content = [
            {**self._token(token), "top_logprobs": [self._token(other) for other in token["top"]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: Mapping[str, Any]) -> dict[str, Any]:
        text = self._tokenizer.decode([token["token_id"]])
        return {"token": text, "bytes": list(text.encode()), "logprob": token["logprob"]}

    def _text_logprobs(self, tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        texts = [self._tokenizer.decode([token["token_id"]]) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [
                {self._tokenizer.decode([other["token_id"]]): other["logprob"] for other in token["top"]}
                for token in tokens
            ],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }


def _error(error: Mapping[str, Any]) -> dict[str, Any]:
    return {"code": error["type"], "message": error["message"]}


def _tokenizer_of(spec: JobSpec) -> Tokenizer:
    checkpoint = open_checkpoint(spec.model, weights=False)
    return family_of(checkpoint).codec(checkpoint, spec.model).tokenizer
