"""Conversations → ids, case by case as upstream's chat builders make them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from b2batch.errors import RowError, RowFault
from b2batch.models.chat import Baichuan1Chat, Baichuan2Chat, ChatFormat
from b2batch.models.tokenizer import BaichuanTokenizer

KINDS = ("b2_real", "b2_tiny", "b1_13b_tiny")
# Upstream keeps the wrong end of the prompt where the budget is nothing or less: an error here.
BUDGET_CASES = ("max_new_tokens_equals_limit", "max_new_tokens_over_limit")
ChatOf = Callable[[str], ChatFormat]


@pytest.fixture(scope="session")
def chat(shared_dir: Path) -> ChatOf:
    def build(kind: str) -> ChatFormat:
        directory = "baichuan2-tokenizer" if kind == "b2_real" else "ckpt/b2_7b-tiny"
        tokenizer = BaichuanTokenizer(shared_dir / "golden" / directory / "tokenizer.model")
        return (
            Baichuan1Chat(tokenizer, 195, 196, 2)
            if kind.startswith("b1")
            else Baichuan2Chat(tokenizer, 195, 196)
        )

    return cache(build)


@pytest.fixture(scope="session")
def chat_cases(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / "golden" / "expected" / "chat_prompts.json").read_text())


def outcome(chat: ChatFormat, kind_cases: dict[str, Any], case: dict[str, Any]) -> list[int] | None:
    """The ids of a case, None where the conversation is refused."""
    max_new_tokens = case["max_new_tokens"] or kind_cases["generation_config"]["max_new_tokens"]
    try:
        return chat.encode_newest(
            case["messages"],
            max_model_len=kind_cases["model_max_length"],
            max_new_tokens=max_new_tokens,
            allow_special=True,
        )
    except RowError:
        return None


def sayable(kind: str, chat_cases: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases whose whole conversation the format can say; Baichuan 1 has no system role."""
    fits = [case for case in chat_cases[kind]["cases"] if "error" not in case]
    if not kind.startswith("b1"):
        return fits
    return [case for case in fits if all(m["role"] != "system" for m in case["messages"])]


@pytest.mark.parametrize("kind", KINDS)
def test_every_conversation_becomes_upstreams_ids(
    kind: str, chat: ChatOf, chat_cases: dict[str, Any]
) -> None:
    cases = chat_cases[kind]
    budget_less = [case["name"] for case in cases["cases"] if outcome(chat(kind), cases, case) is None]
    refused_upstream = [case["name"] for case in cases["cases"] if "error" in case]
    assert set(budget_less) - set(refused_upstream) <= set(BUDGET_CASES)
    for case in cases["cases"]:
        if case["name"] not in BUDGET_CASES:
            assert outcome(chat(kind), cases, case) == case.get("ids"), case["name"]


@pytest.mark.parametrize("kind", ["b2_real", "b2_tiny"])
@pytest.mark.parametrize("name", BUDGET_CASES)
def test_a_budget_of_nothing_is_an_error(
    kind: str, name: str, chat: ChatOf, chat_cases: dict[str, Any]
) -> None:
    cases = chat_cases[kind]
    case = next(case for case in cases["cases"] if case["name"] == name)
    with pytest.raises(RowError, match="leaves no room") as caught:
        chat(kind).encode_newest(
            case["messages"],
            max_model_len=cases["model_max_length"],
            max_new_tokens=case["max_new_tokens"],
        )
    assert caught.value.failure.fault is RowFault.PROMPT_TOO_LONG


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_role_token_adds_no_turn(
    kind: str, chat: ChatOf, chat_cases: dict[str, Any]
) -> None:
    for case in sayable(kind, chat_cases):
        ids = chat(kind).encode(case["messages"])
        roles = [m["role"] for m in case["messages"] if m["role"] != "system"]
        num_answers = sum(role != "user" for role in roles)
        opened = num_answers + (case["messages"][-1]["role"] != "assistant" or kind.startswith("b1"))
        if case["name"] == "assistant_first" and kind.startswith("b1"):
            opened = ids.count(196)  # Baichuan 1 drops an answer that nobody asked for
        assert (ids.count(195), ids.count(196)) == (roles.count("user"), opened), case["name"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_conversation_is_whole_unless_it_has_to_fit(
    kind: str, chat: ChatOf, chat_cases: dict[str, Any]
) -> None:
    for case in sayable(kind, chat_cases):
        whole = chat(kind).encode(case["messages"], allow_special=True)
        fitted = chat(kind).encode_newest(
            case["messages"], max_model_len=1 << 20, max_new_tokens=1, allow_special=True
        )
        assert whole == fitted


@pytest.mark.parametrize(
    ("kind", "messages", "fault"),
    [
        ("b2_tiny", [], RowFault.PROMPT_EMPTY),
        ("b1_13b_tiny", [], RowFault.PROMPT_EMPTY),
        ("b2_tiny", ["user", "system"], RowFault.PROMPT_TYPE),
        ("b1_13b_tiny", ["system", "user"], RowFault.PROMPT_TYPE),
        ("b1_13b_tiny", ["assistant"], RowFault.PROMPT_EMPTY),
    ],
)
def test_conversations_that_a_format_cannot_say(
    kind: str, messages: list[str], fault: RowFault, chat: ChatOf
) -> None:
    with pytest.raises(RowError) as caught:
        chat(kind).encode([{"role": role, "content": "你好"} for role in messages])
    assert caught.value.failure.fault is fault
