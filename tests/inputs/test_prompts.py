from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.errors import RowError, RowFault, SpecError, Stage
from b2batch.inputs import sandbox
from b2batch.inputs.prompts import MAX_PROMPT_BYTES, ChatMessage, PromptRenderer
from b2batch.spec import PromptSpec

EXAMPLES = [{"user": "Q1 ", "assistant": "A1"}, {"user": "Q2 {{ x }} ", "assistant": "A2"}]


def renderer(**settings: Any) -> PromptRenderer:
    return PromptRenderer(PromptSpec(**settings))


def fails(fault: RowFault, columns: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(RowError) as caught:
        renderer(**settings).render(columns)
    failure = caught.value.failure
    assert (failure.fault, failure.stage) == (fault, Stage.RENDER)
    assert "Traceback" not in failure.message
    return failure.message


def turns(prompt: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in prompt.messages]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_of_a_row_stays_as_it_is(text: str) -> None:
    prompt = renderer(template="<{{ text }}>\n").render({"text": text})
    assert prompt.text == f"<{text}>\n"
    assert prompt.messages == (ChatMessage("user", f"<{text}>\n"),)
    if text.strip():
        assert renderer(column="text").render({"text": text}).text == text


@pytest.mark.shared
def test_naughty_strings_pass_through_byte_for_byte(shared_dir: Path) -> None:
    template = renderer(template="{{ text }}|")
    for text in json.loads((shared_dir / "data/bad/naughty-strings/blns.json").read_text()):
        rendered = template.render({"text": text}).text
        assert rendered is not None
        assert rendered.encode() == text.encode() + b"|"


@pytest.mark.parametrize("text", ["{{ 7*7 }}", "{% for x in y %}", "{# #}", "<b>&amp;</b>", "{{ secret }}"])
def test_template_code_in_a_row_is_text(text: str) -> None:
    rows = {"text": text, "secret": "s"}
    assert renderer(template="{{ text }}").render(rows).text == text
    assert renderer(template="x", system="{{ text }}").render(rows).messages[0].content == text


def test_system_and_examples_come_before_the_prompt() -> None:
    prompt = renderer(template="Q {{ x }}", system="Be {{ how }}.", examples=EXAMPLES).render(
        {"x": 3, "how": "brief"}
    )
    assert prompt.text == "Be brief.\n\nQ1 A1\n\nQ2 {{ x }} A2\n\nQ 3"
    assert turns(prompt) == [
        ("system", "Be brief."),
        ("user", "Q1 "),
        ("assistant", "A1"),
        ("user", "Q2 {{ x }} "),
        ("assistant", "A2"),
        ("user", "Q 3"),
    ]


def test_messages_are_templates_and_have_no_plain_text() -> None:
    spec = [{"role": "system", "content": "S {{ a }}"}, {"role": "user", "content": "{{ b }}"}]
    prompt = renderer(messages=spec, examples=EXAMPLES[:1]).render({"a": 1, "b": "x"})
    assert prompt.text is None
    assert turns(prompt) == [("system", "S 1"), ("user", "Q1 "), ("assistant", "A1"), ("user", "x")]


def test_a_column_of_messages() -> None:
    conversation = [
        {"role": "user", "content": "{{ x }}", "name": None},
        {"role": "assistant", "content": "b"},
    ]
    prompt = renderer(column="m", system="S").render({"m": [*conversation, {"role": "user", "content": "c"}]})
    assert prompt.text is None
    assert turns(prompt) == [("system", "S"), ("user", "{{ x }}"), ("assistant", "b"), ("user", "c")]


def test_the_rows_own_system_message_wins() -> None:
    row = {"m": [{"role": "system", "content": "mine"}, {"role": "user", "content": "q"}]}
    prompt = renderer(column="m", system="job's", examples=EXAMPLES[:1]).render(row)
    assert turns(prompt) == [("system", "mine"), ("user", "Q1 "), ("assistant", "A1"), ("user", "q")]


def test_json_text_in_a_column_is_text() -> None:
    text = '[{"role": "user", "content": "x"}]'
    assert renderer(column="m").render({"m": text}).text == text


@pytest.mark.parametrize(
    ("value", "fault", "said"),
    [
        (None, RowFault.PROMPT_MISSING, "'m' is null or missing"),
        (3, RowFault.PROMPT_TYPE, "found integer"),
        ({"role": "user"}, RowFault.PROMPT_TYPE, "found object"),
        (b"bytes", RowFault.PROMPT_TYPE, "found bytes"),
        ("", RowFault.PROMPT_EMPTY, "empty"),
        (" \n\u3000", RowFault.PROMPT_EMPTY, "empty"),
        ([], RowFault.PROMPT_EMPTY, "no messages"),
        (["hi"], RowFault.PROMPT_TYPE, "m[0]: expected an object with role and content, found string"),
        ([{"role": "tool", "content": "x"}], RowFault.PROMPT_TYPE, "found 'tool'"),
        ([{"content": "x"}], RowFault.PROMPT_TYPE, "found null"),
        ([{"role": ["user"], "content": "x"}], RowFault.PROMPT_TYPE, "found array"),
        ([{"role": "user", "content": None}], RowFault.PROMPT_TYPE, "content must be text, found null"),
        ([{"role": "user", "content": [{"text": "x"}]}], RowFault.PROMPT_TYPE, "found array"),
        ([{"role": "user", "content": " "}], RowFault.PROMPT_EMPTY, "last message"),
        ([{"role": "user", "content": "x", "tool_calls": []}], RowFault.PROMPT_TYPE, "'tool_calls'"),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
            RowFault.PROMPT_TYPE,
            "m[1]",
        ),
    ],
)
def test_a_column_that_holds_no_prompt(value: Any, fault: RowFault, said: str) -> None:
    assert said in fails(fault, {"m": value}, column="m")


def test_a_missing_column_value() -> None:
    fails(RowFault.PROMPT_MISSING, {"other": "x"}, column="m")


@pytest.mark.parametrize(
    ("template", "fault", "said"),
    [
        ("{{ txt }}", RowFault.PROMPT_TEMPLATE, "'txt' is undefined; the row has: 'text', 'gone', 'o'"),
        ("{{ o.b }}", RowFault.PROMPT_TEMPLATE, "has no attribute 'b'"),
        ("{{ gone }}", RowFault.PROMPT_MISSING, "the column 'gone' is null"),
        ("{{ o.a }}", RowFault.PROMPT_MISSING, "an expression gave null"),
        ("{{ 1 / 0 }}", RowFault.PROMPT_TEMPLATE, "division by zero"),
        ("{{ text + 1 }}", RowFault.PROMPT_TEMPLATE, "prompt.template: "),
        ("{{ range(10**9) }}", RowFault.PROMPT_TEMPLATE, "Range too big"),
        ("{{ text.__class__.__mro__ }}", RowFault.PROMPT_TEMPLATE, "unsafe"),
        ("{{ o.update({'a': 1}) }}", RowFault.PROMPT_TEMPLATE, "unsafe"),
        ("{{ '\\ud800' }}", RowFault.PROMPT_TEMPLATE, "surrogates"),
        (
            "{% for i in range(99999) %}{{ text * 99 }}{% endfor %}",
            RowFault.PROMPT_TOO_LONG,
            str(MAX_PROMPT_BYTES),
        ),
        ("{% if gone %}x{% endif %} ", RowFault.PROMPT_EMPTY, "empty"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", RowFault.PROMPT_TEMPLATE, "recursion"),
    ],
)
def test_a_template_that_fails_on_a_row(template: str, fault: RowFault, said: str) -> None:
    columns = {"text": "x", "gone": None, "o": {"a": None}}
    assert said in fails(fault, columns, template=template)
    assert columns["o"] == {"a": None}


ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a recursive loop": "{% for i in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "a condition": "{% for i in range(99999) if range(99999)|sum %}{% endfor %}",
}


@pytest.mark.parametrize("how", ENDLESS)
def test_a_template_that_does_not_end_is_ended(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_TEMPLATE_CPU_S", 0.1)
    begin_s = time.thread_time()
    message = fails(RowFault.PROMPT_TEMPLATE, {"text": "x"}, template=ENDLESS[how])
    assert "prompt.template: took more than 0.1 s of CPU time" in message or "recursion" in message
    assert time.thread_time() - begin_s < 2


@pytest.mark.parametrize(
    "template",
    [
        "{{ text * n }}",
        "{{ n * text }}",
        "{{ [text] * n }}",
        "{{ 'x' * 999999999 }}",
        "{{ n ** n ** n }}",
        "{{ 9 ** 99999 }}",
        "{{ text.center(n) }}",
        "{{ text | center(n) }}",
        "{{ text | center(width=n) }}",
        "{{ text.zfill(n) }}",
        "{{ text | indent(n) }}",
        "{{ (text * 99).replace('a', text * 999999) }}",
        "{{ (text * 99) | replace('a', text * 999999) }}",
        "{{ range(99999) | join(text * 999) }}",
        "{{ (text * 999).join(range(9999) | map('string')) }}",
        "{{ [1] | slice(n) | list }}",
        "{% set ns = namespace(t=text) %}{% for i in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t=text) %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% set ns = namespace(n=n) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% macro f() %}{% for i in range(9999) %}{{ text * 9999 }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% set t %}{% for i in range(9999) %}{{ text * 9999 }}{% endfor %}{% endset %}{{ t }}",
    ],
)
def test_a_value_that_would_fill_the_memory_is_refused_before_it_is_made(template: str) -> None:
    message = fails(RowFault.PROMPT_TEMPLATE, {"text": "aaa", "n": 999_999_999}, template=template)
    assert "prompt.template: makes a" in message


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ [1, 2] | join(', ') }}|{{ ', '.join(m | map('upper')) }}", "1, 2|A, B"),
        ("{{ m | map('upper') | join(d='-') }}{{ m | join }}", "A-Bab"),
        (
            "{{ 'a' ~ 1 ~ m[0] }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ 1.5 * 2 }}{{ m + m }}",
            "a1a1024abab3.0['a', 'b', 'a', 'b']",
        ),
        (
            "{% for x in m %}{{ loop.index }}/{{ loop.length }}{{ x }}{% if not loop.last %},{% endif %}"
            "{% endfor %}",
            "1/2a,2/2b",
        ),
        ("{% for x in m if x != 'a' %}{{ x }}{% else %}none{% endfor %}", "b"),
        ("{{ 'a\nb' | indent(2) }}{{ 'x'.center(3) }}{{ 'x' | center(3) }}", "a\n  b x  x "),
        ("{{ 'aXb' | replace('X', '--') }}{{ 'aXb'.replace('X', '-', 1) }}", "a--ba-b"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2] | slice(2) | list }}", "[[1, 2], [3]][[1], [2]]"),
    ],
)
def test_the_limits_leave_ordinary_templates_alone(template: str, text: str) -> None:
    assert renderer(template=template).render({"m": ["a", "b"]}).text == text


def test_null_is_fine_where_the_template_provides_for_it() -> None:
    template = "{% if title %}{{ title }}: {% endif %}{{ text or 'nothing' }}"
    assert renderer(template=template).render({"title": None, "text": None}).text == "nothing"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "a\n{{ b"}, "prompt.template: line 2: "),
        ({"template": "{{ x | nosuch }}"}, "prompt.template: line 1: No filter named 'nosuch'"),
        ({"template": "{{ x | random }}"}, "'random'"),
        ({"template": "x", "system": "{% if %}"}, "prompt.system: line 1: "),
        ({"messages": [{"role": "user", "content": "{{"}]}, "prompt.messages[0].content: line 1: "),
        ({"template": "{% include 'x' %}"}, "cannot include"),
        ({"template": "{% include x %}"}, "cannot include"),
        ({"template": "x" * 300_000}, "prompt.template: 300000 characters"),
        ({"template": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"}, "prompt.template: nested too deeply"),
    ],
)
def test_a_faulty_template_is_refused_at_once(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        renderer(**settings)
    assert said in str(caught.value)


SCHEMA = pa.schema([("text", pa.string()), ("title", pa.string())])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template": "{{ txt }}"}, "prompt.template: the input has no column 'txt'; did you mean 'text'"),
        ({"column": "Text"}, "prompt.column: the input has no column 'Text'; did you mean 'text'"),
        ({"column": "text", "system": "{{ titel }}"}, "prompt.system: .*'titel'; did you mean 'title'"),
        ({"messages": [{"role": "user", "content": "{{ q }}"}]}, r"prompt.messages\[0\].content: .*'q'"),
    ],
)
def test_a_prompt_of_other_columns_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        renderer(**settings).check_columns(SCHEMA)
    renderer(**settings).check_columns(pa.schema([]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ text }}",
        "{% for c in text %}{{ loop.index }}{{ c }}{% endfor %}",
        "{% set a = title %}{{ a }}",
        "{{ range(3) }}",
    ],
)
def test_a_prompt_of_its_columns_is_accepted(template: str) -> None:
    renderer(template=template).check_columns(SCHEMA)
