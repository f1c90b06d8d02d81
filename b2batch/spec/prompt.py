"""The ``prompt`` section of a job file: how a row becomes a prompt."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from b2batch.spec.section import Section

MAX_EXAMPLES_BYTES = 8 << 20


class Message(Section):
    """One turn; ``content`` is a template over the row's columns."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(Section):
    """One worked example, shown before the row's own prompt; plain text, no template.

    ``key`` is what ``prompt.nearest`` compares with the row; without it, ``user`` is.
    """

    user: str
    assistant: str
    key: str | None = None


def _as_examples(value: Any) -> Any:
    """Examples as they are, or those of a JSON Lines file, which so become part of the job."""
    if not isinstance(value, str):
        return value
    try:
        if os.path.getsize(value) > MAX_EXAMPLES_BYTES:
            raise ValueError(f"{value}: larger than {MAX_EXAMPLES_BYTES} bytes")
        with open(value, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{value}: examples are JSON Lines of user and assistant: {error}") from error


class NearestSpec(Section):
    """Instead of all examples, those most like the row: ``k`` by what stands in ``column``."""

    column: str | None = None
    k: int = Field(default=4, ge=1, le=100)


class PromptSpec(Section):
    """How a row becomes a prompt: exactly one of ``template``, ``messages`` and ``column``.

    ``column`` names text, or a list of ``{role, content}`` messages. ``chat: auto`` uses the chat
    format for chat models and for message lists, plain text for base models.
    """

    template: str | None = None
    messages: tuple[Message, ...] | None = None
    column: str | None = None
    system: str | None = None
    examples: Annotated[tuple[Example, ...], BeforeValidator(_as_examples)] = ()
    nearest: NearestSpec = NearestSpec()
    chat: Literal["auto"] | bool = "auto"
    allow_special_tokens: bool = Field(
        default=False, description="let <reserved_106>, </s> in row text be control tokens"
    )
    on_too_long: Literal["error", "truncate_left", "truncate_right"] = "error"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("template", "messages", "column") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of template, messages and column is needed, found {found}")
        if self.nearest.column is not None and not self.examples:
            raise ValueError("nearest.column: there are no examples to choose from")
        if self.messages is not None and not self.messages:
            raise ValueError("messages must not be empty")
        if self.system is not None and self.messages is not None and self.messages[0].role == "system":
            raise ValueError("system is given twice: as `system` and as the first of `messages`")
        return self
