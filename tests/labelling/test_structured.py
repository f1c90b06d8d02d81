"""Answers bound to choices, regexes and JSON schemas: what comes out always fits, and is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from b2batch.engine.request import Request
from b2batch.engine.structured import Grammars
from b2batch.errors import SpecError
from b2batch.labelling.grammar import grammar_of, schema_grammar
from b2batch.models.tokenizer import BaichuanTokenizer
from b2batch.outputs.parsed import arrow_type, conform
from b2batch.spec import SamplingSpec, StructuredOutputsSpec, parse_spec
from labelling.running import REVIEWS, make_spec, run

DRAWN = {"temperature": 5.0, "seed": 3, "max_tokens": 120}

SCHEMAS: dict[str, dict[str, Any]] = {
    "an enum in Chinese": {"enum": ["正面", "负面", "正面但有保留"]},
    "a number in bounds": {"type": "integer", "minimum": -5, "maximum": 120},
    "an array in bounds": {
        "type": "array",
        "items": {"type": "number", "minimum": 0, "maximum": 1},
        "minItems": 1,
        "maxItems": 3,
    },
    "an object": {
        "type": "object",
        "properties": {"标签": {"enum": ["好", "差"]}, "确定": {"type": "boolean"}},
        "required": ["标签", "确定"],
    },
    "optional members": {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 9}, "b": {"enum": ["x"]}, "c": {"type": "null"}}
        | {"c": {"type": ["boolean", "null"]}},
        "required": ["b"],
    },
    "an object within": {
        "type": "object",
        "properties": {
            "评价": {
                "type": "object",
                "properties": {"分": {"type": "integer", "minimum": 1, "maximum": 5}},
                "required": ["分"],
            }
        },
        "required": ["评价"],
    },
    "a definition": {
        "$defs": {"面": {"enum": ["屏幕", "电池"]}},
        "type": "object",
        "properties": {"方面": {"type": "array", "items": {"$ref": "#/$defs/面"}, "maxItems": 2}},
        "required": ["方面"],
    },
    "a short text": {
        "type": "object",
        "properties": {"摘要": {"type": "string", "maxLength": 12}},
        "required": ["摘要"],
    },
    "a pattern": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"},
    "null or a value": {"anyOf": [{"type": "number"}, {"type": "null"}]},
}
REGEXES = ["[1-5]", r"\d{4}-\d{2}-\d{2}", "(正面|负面)(，理由：[^，。]{2,6}。)?", "[A-Z]{2,3}[0-9]{0,3}x"]


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_answers_fit_their_schema_and_are_typed(tmp_path, tiny, name) -> None:
    schema = SCHEMAS[name]
    rows = [{"text": text} for text in REVIEWS * 2]
    spec = make_spec(tmp_path, rows, structured_outputs={"json": schema}, sampling=DRAWN)
    found = run(spec, tiny).rows
    whole = [row for row in found if row["finish_reason"] == "stop"]
    assert whole
    for row in whole:
        jsonschema.validate(json.loads(row["generated_text"]), schema)
        assert row["parse_error"] is None
    assert {row["status"] for row in found} == {"ok"}
    assert pq.read_table(spec.output.path).schema.field("parsed").type == arrow_type(schema)


@pytest.mark.parametrize("regex", REGEXES)
def test_regex_answers_match_as_a_whole(tmp_path, tiny, regex) -> None:
    rows = [{"text": text} for text in REVIEWS * 2]
    spec = make_spec(tmp_path, rows, structured_outputs={"regex": regex}, sampling=DRAWN)
    found = run(spec, tiny).rows
    whole = [row for row in found if row["finish_reason"] == "stop"]
    assert whole
    assert [row["parsed"] for row in whole if not re.fullmatch(regex, row["parsed"])] == []


def test_only_choices_come_out_also_when_one_begins_another(tmp_path, tiny) -> None:
    choices = ["正面", "正面的", "正面的评价", "负面", "负", "𠮷"]
    rows = [{"text": text} for text in REVIEWS * 4]
    sampling = {"temperature": 30.0, "seed": 1}
    spec = make_spec(tmp_path, rows, structured_outputs={"choice": choices}, sampling=sampling)
    found = run(spec, tiny).rows
    assert {row["finish_reason"] for row in found} == {"stop"}
    assert {row["parsed"] for row in found} <= set(choices)
    assert len({row["parsed"] for row in found}) > 2, "they are drawn apart"
    assert [row["parsed"] for row in found] == [row["generated_text"] for row in found]


def test_free_and_bound_answers_share_a_batch(tiny) -> None:
    """Rows without a grammar get what they get alone."""
    from b2batch.engine_start import make_engine

    engine = make_engine(parse_spec(MINIMAL), tiny)
    ids = tiny.codec.chat.encode([{"role": "user", "content": REVIEWS[0]}])
    grammar = grammar_of(StructuredOutputsSpec(choice=("差评",)))
    sampling = SamplingSpec(max_tokens=6)
    engine.add(Request("free", ids, sampling))
    alone = finish(engine)["free"]
    engine.add(Request("bound", ids, sampling, grammar))
    engine.add(Request("free", ids, sampling))
    together = finish(engine)
    assert together["free"] == alone
    assert tiny.codec.tokenizer.decode(together["bound"]) == "差评"


MINIMAL: dict[str, Any] = {
    "model": {"model": "baichuan2-tiny"},
    "input": {"path": "rows.jsonl"},
    "prompt": {"column": "text"},
    "output": {"path": "out"},
}


def finish(engine) -> dict[str, tuple[int, ...]]:
    found = {}
    while engine.has_work:
        found |= {done.request_id: done.completions[0].token_ids for done in engine.step()}
    return found


def test_a_cut_answer_has_no_value_and_says_why(tmp_path, tiny) -> None:
    schema = {
        "type": "object",
        "properties": {"理由": {"type": "string", "minLength": 50}},
        "required": ["理由"],
    }
    sampling = {"max_tokens": 5}
    spec = make_spec(tmp_path, [{"text": REVIEWS[0]}], structured_outputs={"json": schema}, sampling=sampling)
    (row,) = run(spec, tiny).rows
    assert (row["status"], row["finish_reason"], row["parsed"]) == ("ok", "length", None)
    assert "max_tokens" in row["parse_error"]


class Aspect(BaseModel):
    name: Literal["屏幕", "电池"]
    score: int | None = None


class Opinion(BaseModel):
    label: Literal["正面", "负面"]
    aspects: list[Aspect]


def test_a_pydantic_model_is_a_schema(tmp_path, tiny) -> None:
    wanted = {"json": "labelling.test_structured:Opinion"}
    spec = make_spec(
        tmp_path, [{"text": text} for text in REVIEWS], structured_outputs=wanted, sampling=DRAWN
    )
    assert parse_spec(spec.model_dump(mode="json")) == spec, "the run's record is read back without it"
    whole = [row for row in run(spec, tiny).rows if row["finish_reason"] == "stop"]
    assert whole
    for row in whole:
        assert Opinion.model_validate_json(row["generated_text"]).model_dump() == row["parsed"]


@pytest.fixture(scope="module")
def real_tokenizer(shared_dir: Path) -> BaichuanTokenizer:
    return BaichuanTokenizer(shared_dir / "golden" / "baichuan2-tokenizer" / "tokenizer.model")


@pytest.fixture(scope="module")
def real_grammars(real_tokenizer: BaichuanTokenizer) -> Grammars:
    return Grammars(lambda: real_tokenizer.grammar_vocabulary(125_696, {2}), 125_696)


@settings(max_examples=12)
@given(data=st.data(), name=st.sampled_from(sorted(SCHEMAS)))
def test_whatever_the_real_vocabulary_may_write_fits(real_grammars, real_tokenizer, data, name) -> None:
    """Tokens drawn at random from what the masks of the 125,696 pieces allow."""
    constraint = real_grammars.constraint(schema_grammar(SCHEMAS[name]))
    rng = data.draw(st.randoms(use_true_random=False))
    tokens = []
    while not constraint.is_complete and len(tokens) < 200:
        real_grammars.begin_masks([constraint])
        allowed = (~real_grammars.masks()[0]).nonzero()[0].tolist()
        token = rng.choice(allowed)
        assert constraint.accept(token) is None
        if token == 2:
            break
        tokens.append(token)
    else:
        if not constraint.is_complete:
            return
    text = real_tokenizer.decode(tokens)
    value = json.loads(text)
    jsonschema.validate(value, SCHEMAS[name])
    assert "reserved_" not in text
    type_ = arrow_type(SCHEMAS[name])
    assert pa.array([conform(value, type_)], type_).type == type_


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({}, "anything"),
        ({"type": ["string", "integer"]}, "several kinds"),
        ({"type": "object"}, "without members"),
        ({"type": "array"}, "items"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "within itself"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/no"}}}, "there is no #/\\$defs/no"),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, "/properties/a"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "no type 'text'"),
    ],
)
def test_a_schema_without_a_column_type_is_refused(schema, told) -> None:
    with pytest.raises(SpecError, match=told):
        arrow_type(schema)


@pytest.mark.parametrize(
    ("value", "type_"),
    [
        (1 << 63, pa.int64()),
        (10**400, pa.float64()),
        (True, pa.int64()),
        ("\ud800", pa.string()),
        ({"b": 1}, pa.struct({"a": pa.int64()})),
        ([1, "x"], pa.list_(pa.int64())),
    ],
)
def test_a_value_that_arrow_cannot_hold_is_refused(value, type_) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is the row's, whatever it says
        conform(value, type_)


def test_a_member_may_be_called_like_a_keyword(tmp_path, tiny) -> None:
    members = {
        "properties": {"enum": ["x"]},
        "type": {"type": "integer", "maximum": 3},
        "enum": {"const": "y"},
    }
    schema = {"type": "object", "properties": members, "required": list(members)}
    sampling = {"max_tokens": 80, "temperature": 5.0}
    spec = make_spec(tmp_path, [{"text": "好"}], structured_outputs={"json": schema}, sampling=sampling)
    (row,) = run(spec, tiny).rows
    assert (row["parsed"]["properties"], row["parsed"]["enum"]) == ("x", "y")
    assert -(1 << 53) < row["parsed"]["type"] <= 3, "an integer without a bound stays one that all can read"


def test_unnamed_members_are_a_map() -> None:
    type_ = arrow_type({"type": "object", "additionalProperties": {"type": "integer"}})
    assert type_ == pa.map_(pa.string(), pa.int64())
    assert pa.array([conform({"a": 1}, type_)], type_).to_pylist() == [[("a", 1)]]


@pytest.mark.parametrize(
    ("structured", "told"),
    [
        ({"choice": ["a"], "regex": "a"}, "at most one"),
        ({"choice": []}, "structured_outputs.choice"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex"),
        ({"json": "no_such_module:Class"}, "no_such_module"),
        ({"json": "labelling.test_structured:DRAWN"}, "not a pydantic model"),
    ],
)
def test_what_cannot_be_enforced_is_refused(structured, told) -> None:
    with pytest.raises(SpecError, match=told):
        grammar_of(parse_spec(MINIMAL | {"structured_outputs": structured}).structured_outputs)
