"""``structured_outputs`` → a grammar in llguidance's notation, and an answer → its parsed value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from llguidance import LLMatcher, regex_to_lark

from b2batch.errors import SpecError
from b2batch.outputs.parsed import closed, conform
from b2batch.rows import FinishReason, Sample
from b2batch.spec import StructuredOutputsSpec

# At most one blank between JSON's tokens, so that no answer is lost in white space; no \u escapes,
# so that every string is whole Unicode.
_JSON_OPTIONS: Any = {"whitespace_pattern": " ?", "json_allowed_escapes": 'nrbtf\\"'}


def grammar_of(spec: StructuredOutputsSpec) -> str | None:
    """The grammar of a job's answers, None when they are free.

    Raises:
        SpecError: the regex or the schema cannot be enforced.
    """
    if spec.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in spec.choice)
        return _checked("choice", LLMatcher.grammar_from_lark(f"start: {texts}"))
    if spec.regex is not None:
        pattern = regex_to_lark(spec.regex, "d")  # \\d is 0-9: Unicode's digits differ by its version
        return _checked("regex", LLMatcher.grammar_from_lark(f"start: /{pattern}/"))
    return None if spec.json is None else schema_grammar(spec.json)


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of a JSON schema; SpecError when it cannot be enforced."""
    text = json.dumps(closed(schema), ensure_ascii=False)
    return _checked("json", LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _checked(form: str, grammar: str) -> str:
    fault = LLMatcher.validate_grammar(grammar)
    if fault:
        raise SpecError(f"structured_outputs.{form}: cannot be enforced: {fault}")
    return grammar


def parse_answer(spec: StructuredOutputsSpec, sample: Sample, type_: pa.DataType) -> Any:
    """The value of an answer for a column of type ``type_``.

    Raises:
        ValueError: it has none; the message is the reason.
    """
    if sample.finish_reason is FinishReason.LENGTH:
        raise ValueError("cut by max_tokens or the context")
    if spec.json is not None:
        return conform(json.loads(sample.text), type_)
    if spec.choice is not None and sample.text not in spec.choice:
        raise ValueError("none of the choices; a stop string may have cut it")
    return sample.text
