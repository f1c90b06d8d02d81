"""An OpenAI batch file in, output and error files out, read back by OpenAI's own types."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming

from b2batch.errors import OutputError, SpecError
from b2batch.export import export_openai
from b2batch.outputs.finalise import finalise
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.preflight import prepare_job
from b2batch.spec import JobSpec, parse_spec
from labelling.running import REVIEW_TEMPLATE, REVIEWS, run

SCHEMA = {"type": "object", "properties": {"标签": {"enum": ["正面", "负面"]}}, "required": ["标签"]}


def chat_line(number: int, **settings: Any) -> dict[str, Any]:
    text = REVIEW_TEMPLATE.replace("{{ text }}", REVIEWS[number % len(REVIEWS)])
    body: CompletionCreateParamsNonStreaming = {
        "model": "baichuan2-tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        **settings,
    }
    return {"custom_id": f"c-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


LINES: list[Any] = [
    chat_line(0),
    chat_line(1, temperature=0.7, top_p=0.9, seed=5, n=3),
    chat_line(2, logprobs=True, top_logprobs=2),
    chat_line(
        3,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        max_tokens=40,
    ),
    {
        "custom_id": "t-4",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "很", "max_tokens": 4, "logprobs": 1, "stop": ["。"]},
    },
    chat_line(
        5,
        messages=[
            {"role": "developer", "content": "短答"},
            {"role": "user", "content": [{"type": "text", "text": "好吗"}]},
        ],
    ),
]
BAD_LINES: list[Any] = [
    '{"custom_id": "half',
    chat_line(7, tools=[{"type": "function"}]) | {"custom_id": "tools"},
    chat_line(8, temperature=-1) | {"custom_id": "cold"},
    {"custom_id": "nowhere", "method": "POST", "url": "/v1/embeddings", "body": {}},
    chat_line(9, messages=[]) | {"custom_id": "mute"},
    chat_line(10, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}})
    | {"custom_id": "shapeless"},
]


def batch_spec(tmp_path: Path, lines: list[Any]) -> JobSpec:
    file = tmp_path / "batch.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    file.write_text("\n".join(texts), encoding="utf-8")
    return parse_spec(
        {
            "model": {"model": "baichuan2-tiny"},
            "input": {"path": str(file), "format": "openai-batch", "rows_per_unit": 4},
            "output": {"path": str(tmp_path / "out")},
        }
    )


def finish(spec: JobSpec) -> None:
    job = prepare_job(spec)
    directory = RunDirectory.existing(open_store(spec.output.path, job.record.run_id))
    finalise(directory, job.plan.units, job.schema, num_skipped_blank=0, max_error_rate=1.0)


def test_every_line_is_answered_or_refused_under_its_id(tmp_path, tiny) -> None:
    spec = batch_spec(tmp_path, LINES + BAD_LINES)
    run(spec, tiny)
    with pytest.raises(OutputError, match="not finished"):
        export_openai(spec.output.path, io.StringIO(), io.StringIO(), created_s=1)
    finish(spec)
    responses, errors = io.StringIO(), io.StringIO()
    exported = export_openai(spec.output.path, responses, errors, created_s=1_700_000_000)
    assert (exported.num_responses, exported.num_errors) == (len(LINES), len(BAD_LINES))
    answered = {line["custom_id"]: line for line in map(json.loads, responses.getvalue().splitlines())}
    assert list(answered) == [line["custom_id"] for line in LINES]
    assert {line["response"]["status_code"] for line in answered.values()} == {200}
    bodies = {name: line["response"]["body"] for name, line in answered.items()}
    chats = {name: ChatCompletion.model_validate(b) for name, b in bodies.items() if name.startswith("c-")}
    assert chats["c-0"].choices[0].message.content == "正面"
    assert [choice.index for choice in chats["c-1"].choices] == [0, 1, 2]
    logprobs = chats["c-2"].choices[0].logprobs
    assert logprobs is not None
    assert {len(token.top_logprobs) for token in logprobs.content or []} == {2}
    content = chats["c-3"].choices[0].message.content or ""
    jsonschema.validate(json.loads(content), SCHEMA)
    text = Completion.model_validate(bodies["t-4"])
    assert text.usage is not None
    assert text.usage.prompt_tokens < 3, "plain text has no chat format around it"
    assert text.choices[0].logprobs is not None
    failed = [json.loads(line) for line in errors.getvalue().splitlines()]
    assert [line["custom_id"] for line in failed] == [None, "tools", "cold", "nowhere", "mute", "shapeless"]
    assert {line["error"]["code"] for line in failed} == {"INPUT_JSON", "INPUT_SCHEMA", "SAMPLING"}
    assert "tools" in failed[1]["error"]["message"]


def test_a_batch_job_leaves_nothing_else_to_say(tmp_path) -> None:
    spec = batch_spec(tmp_path, LINES[:1])
    dump = spec.model_dump(mode="json")
    assert parse_spec(dump) == spec
    for change, told in (
        ({"task": "embed"}, "task: generate"),
        ({"structured_outputs": {"choice": ["a"]}}, "each line says itself"),
        ({"output": {"path": "out", "columns": ["body"]}}, "custom_id"),
    ):
        with pytest.raises(SpecError, match=told):
            parse_spec(dump | change)
