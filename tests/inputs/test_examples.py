"""Worked examples: all of them, those of a file, or those most like the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from b2batch.errors import RowError
from b2batch.inputs.prompts import PromptRenderer
from b2batch.spec import PromptSpec

EXAMPLES = [
    {"user": "酒店的房间很干净", "assistant": "酒店"},
    {"user": "电池不耐用", "assistant": "手机"},
    {"user": "这本书写得很好", "assistant": "书"},
    {"user": "评:x", "assistant": "衣服", "key": "裤子的料子太薄"},
]


def renderer(**settings: Any) -> PromptRenderer:
    return PromptRenderer(PromptSpec(template="{{ text }}", **settings))


def answers(prompt: Any) -> list[str]:
    return [message.content for message in prompt.messages if message.role == "assistant"]


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("房间干净吗", "酒店"), ("手机电池坏了", "手机"), ("好书", "书"), ("裤子太薄了", "衣服")],
)
def test_the_most_similar_example_stands_next_to_the_row(text, nearest) -> None:
    chosen = renderer(examples=EXAMPLES, nearest={"column": "text", "k": 2})
    found = answers(chosen.render({"text": text}))
    assert len(found) == 2
    assert found[-1] == nearest
    assert answers(chosen.render({"text": text})) == found, "the same every time"


def test_of_equals_the_first_examples_are_taken() -> None:
    same = [{"user": "一样", "assistant": str(i)} for i in range(5)]
    chosen = renderer(examples=same, nearest={"column": "text", "k": 3})
    assert answers(chosen.render({"text": "无关"})) == ["2", "1", "0"]


def test_a_file_of_examples_becomes_part_of_the_job(tmp_path: Path) -> None:
    file = tmp_path / "shots.jsonl"
    file.write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in EXAMPLES), encoding="utf-8")
    spec = PromptSpec(template="{{ text }}", examples=str(file))
    file.unlink()
    assert answers(PromptRenderer(spec).render({"text": "x"})) == ["酒店", "手机", "书", "衣服"]
    assert PromptSpec.model_validate(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize("content", ['{"user": "x"}', "{", '["a"]'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "shots.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValidationError, match="examples"):
        PromptSpec(template="{{ text }}", examples=str(file))


def test_a_row_without_the_text_to_compare_is_its_own_error() -> None:
    chosen = renderer(examples=EXAMPLES, nearest={"column": "topic"})
    with pytest.raises(RowError, match="topic"):
        chosen.render({"text": "x", "topic": None})
    with pytest.raises(ValidationError, match="no examples"):
        PromptSpec(template="x", nearest={"column": "topic"})
