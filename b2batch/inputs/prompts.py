"""From a row's columns to its prompt: sandboxed jinja templates, or a column taken as it is.

A prompt always has messages, and text too unless it was given as messages. The text form puts
``system + "\\n\\n"`` first, then each example as ``user + assistant + "\\n\\n"``, then the row's own
prompt. In message form the examples are user and assistant turns after the system message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import jinja2
import pyarrow as pa
from jinja2 import meta

from b2batch.errors import RowError, RowFault, SpecError, Stage
from b2batch.inputs.examples import NearestExamples
from b2batch.inputs.processors import load_processor, process
from b2batch.inputs.sandbox import PromptEnvironment, generate
from b2batch.inputs.schema import check_columns
from b2batch.inputs.strict_json import json_type, shown
from b2batch.spec import Example, JobSpec, PromptSpec

MAX_TEMPLATE_CHARS = 256 * 1024
MAX_PROMPT_BYTES = 4 << 20
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's prompt in chat form, and as plain ``text`` unless it was given as messages."""

    messages: tuple[ChatMessage, ...]
    text: str | None = None


class PromptRenderer:
    """Renders rows by a job's ``prompt`` section; templates are compiled once.

    ``constants`` are names that templates may use beside the row's columns. With ``allow_empty`` a
    prompt may say nothing. ``preprocess`` makes the columns that templates see from the row's.
    ``tick_values`` gives what the name ``tick`` stands for in a row of that tick; without it, it is a column.

    Raises:
        SpecError: a template has a syntax error, is too long, or includes another.
    """

    def __init__(
        self,
        spec: PromptSpec,
        *,
        constants: Mapping[str, Any] | None = None,
        allow_empty: bool = False,
        preprocess: Callable[..., Any] | None = None,
        tick_values: Callable[[str], Mapping[str, Any]] | None = None,
    ) -> None:
        self._spec = spec
        self._constants = constants or {}
        self._allow_empty = allow_empty
        self._preprocess = preprocess
        self._tick_values = tick_values
        self._given = {*self._constants, *(("tick",) if tick_values else ())}
        self._examples = _as_turns(spec.examples)
        self._nearest = (
            None if spec.nearest.column is None else NearestExamples(spec.examples, spec.nearest.k)
        )
        self._system = None if spec.system is None else _compiled("prompt.system", spec.system)
        self._template = None if spec.template is None else _compiled("prompt.template", spec.template)
        self._turns = [
            (message.role, _compiled(f"prompt.messages[{i}].content", message.content))
            for i, message in enumerate(spec.messages or ())
        ]

    @classmethod
    def of(cls, spec: JobSpec) -> Self:
        """The renderer of a job. Templates know the labels of a classification by the name ``labels``."""
        labels = [label.model_dump() for label in spec.labels]
        constants = {"labels": labels} if labels else {}
        preprocess = load_processor(spec.preprocess, "preprocess") if spec.preprocess.function else None
        return cls(
            spec.prompt,
            constants=constants,
            allow_empty=spec.task == "score",
            preprocess=preprocess,
            tick_values=lru_cache(lambda text: spec.schedule.tick(text).values()) if spec.tick else None,
        )

    def check_columns(self, schema: pa.Schema) -> None:
        """Refuse a prompt that uses a column which the input does not have.

        Raises:
            SpecError: names the setting, the column and the nearest ones there are.
        """
        if self._preprocess is not None:
            return  # it may give any column; one that it does not is the row's error
        if self._spec.column is not None:
            check_columns(schema, [self._spec.column], "prompt.column")
        if self._spec.nearest.column is not None:
            check_columns(schema, [self._spec.nearest.column], "prompt.nearest.column")
        for template in self._templates:
            check_columns(schema, set(template.names) - self._given, template.where)
            twice = self._given & set(template.names) & set(schema.names)
            if twice:
                raise SpecError(
                    f"{template.where}: {min(twice)!r} is a column of the input and also what the job file "
                    "says under that name: rename the column"
                )

    @property
    def column_names(self) -> frozenset[str]:
        """The columns that a prompt is made of."""
        used = {name for template in self._templates for name in template.names} - self._given
        named = {self._spec.column, self._spec.nearest.column} - {None}
        return frozenset({*used, *map(str, named)})

    @property
    def _templates(self) -> list[_Template]:
        candidates = [self._system, self._template, *(template for _, template in self._turns)]
        return [template for template in candidates if template is not None]

    def render(self, columns: Mapping[str, Any], tick: str = "") -> Prompt:
        """The prompt of one row, planned by the run of ``tick`` if by one.

        Raises:
            RowError: the prompt is missing, empty, of the wrong type or too long, or its template failed.
        """
        if self._preprocess is not None:
            columns = process(self._preprocess, "preprocess", Stage.RENDER, columns)
        if self._constants:
            columns = {**columns, **self._constants}
        if self._tick_values is not None and tick:
            columns = {**columns, "tick": self._tick_values(tick)}
        system = None if self._system is None else self._system.render(columns)
        examples = self._examples_for(columns)
        if self._turns:
            turns = tuple(ChatMessage(role, template.render(columns)) for role, template in self._turns)
            return self._chat(system, turns, examples)
        if self._template is not None:
            return self._plain(system, self._template.render(columns), examples)
        value = _column_value(columns, str(self._spec.column))
        if isinstance(value, str):
            return self._plain(system, value, examples)
        return self._chat(system, _as_messages(value, str(self._spec.column)), examples)

    def _examples_for(self, columns: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
        if self._nearest is None:
            return self._examples
        name = str(self._spec.nearest.column)
        value = columns.get(name)
        if not isinstance(value, str):
            fault = RowFault.PROMPT_MISSING if value is None else RowFault.PROMPT_TYPE
            raise _row_error(fault, f"prompt.nearest.column: {name!r} holds no text to find examples by")
        return _as_turns(self._nearest.pick(value))

    def _plain(self, system: str | None, text: str, examples: Sequence[ChatMessage]) -> Prompt:
        if not (text.strip() or self._allow_empty):
            raise _row_error(RowFault.PROMPT_EMPTY, "the prompt is empty")
        before = [] if system is None else [ChatMessage("system", system)]
        shots = [f"{user.content}{assistant.content}\n\n" for user, assistant in _pairs(examples)]
        opening = "" if system is None else f"{system}\n\n"
        messages = (*before, *examples, ChatMessage("user", text))
        return Prompt(messages, "".join([opening, *shots, text]))

    def _chat(
        self, system: str | None, turns: Sequence[ChatMessage], examples: Sequence[ChatMessage]
    ) -> Prompt:
        """A row that brings its own system message keeps it: it says more than the job's."""
        if not turns or not turns[-1].content.strip():
            raise _row_error(
                RowFault.PROMPT_EMPTY, "the last message is empty" if turns else "there are no messages"
            )
        if turns[0].role == "system":
            return Prompt((turns[0], *examples, *turns[1:]))
        before = [] if system is None else [ChatMessage("system", system)]
        return Prompt((*before, *examples, *turns))


def _as_turns(examples: Iterable[Example]) -> tuple[ChatMessage, ...]:
    return tuple(
        ChatMessage(role, content)
        for example in examples
        for role, content in (("user", example.user), ("assistant", example.assistant))
    )


def _pairs(examples: Sequence[ChatMessage]) -> Iterable[tuple[ChatMessage, ChatMessage]]:
    return zip(examples[::2], examples[1::2], strict=True)


def _row_error(fault: RowFault, message: str) -> RowError:
    return RowError(fault, message, Stage.RENDER)


# --- a column taken as it is ---------------------------------------------------------------------


def _column_value(columns: Mapping[str, Any], name: str) -> Any:
    value = columns.get(name)
    if value is None:
        raise _row_error(RowFault.PROMPT_MISSING, f"the prompt column {name!r} is null or missing")
    if not isinstance(value, str | list):
        raise _row_error(
            RowFault.PROMPT_TYPE,
            f"the prompt column {name!r}: expected text or a list of messages, found {_type_name(value)}",
        )
    return value


def _as_messages(values: list[Any], name: str) -> tuple[ChatMessage, ...]:
    return tuple(_as_message(value, i, f"{name}[{i}]") for i, value in enumerate(values))


def _as_message(value: Any, position: int, where: str) -> ChatMessage:
    fault = _message_fault(value, position)
    if fault is not None:
        raise _row_error(RowFault.PROMPT_TYPE, f"the prompt column's message {where}: {fault}")
    return ChatMessage(value["role"], value["content"])


def _message_fault(value: Any, position: int) -> str | None:
    """What is wrong with a message of a row. Other keys are fine as long as they say nothing (null)."""
    if not isinstance(value, dict):
        return f"expected an object with role and content, found {_type_name(value)}"
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        found = shown(role) if isinstance(role, str) else _type_name(role)
        return f"role must be one of {', '.join(_ROLES)}, found {found}"
    if role == "system" and position:
        return "a system message may only be the first"
    if not isinstance(content, str):
        return f"content must be text, found {_type_name(content)}"
    unknown = [key for key, inner in value.items() if key not in ("role", "content") and inner is not None]
    return f"unknown key {shown(unknown[0])}; a message has role and content" if unknown else None


def _type_name(value: Any) -> str:
    try:
        return json_type(value)
    except KeyError:
        return type(value).__name__


# --- templates -----------------------------------------------------------------------------------


class _NullInTemplateError(Exception):
    """A ``{{ … }}`` gave null, which would be written as the word None."""


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise _NullInTemplateError
    return value


_ENVIRONMENT = PromptEnvironment(finalize=_refuse_null)


class _Template:
    """One template of the job file; ``where`` is the setting it stands in, ``names`` the columns it uses."""

    def __init__(self, where: str, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise SpecError(f"{where}: {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
        self.where = where
        try:
            tree = _ENVIRONMENT.parse(source)
            if next(iter(meta.find_referenced_templates(tree)), "") != "":
                raise SpecError(f"{where}: a template cannot include, import or extend another")
            self.names = sorted(meta.find_undeclared_variables(tree) - set(_ENVIRONMENT.globals))
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise SpecError(f"{where}: line {error.lineno}: {error.message}") from None
        except RecursionError:
            raise SpecError(f"{where}: nested too deeply") from None

    def render(self, columns: Mapping[str, Any]) -> str:
        """The text for one row, at most ``MAX_PROMPT_BYTES`` of it."""
        try:
            return _joined(generate(self._template, columns))
        except RowError:
            raise
        except _NullInTemplateError:
            raise _row_error(RowFault.PROMPT_MISSING, self._null_message(columns)) from None
        except Exception as error:  # whatever the user's expression did is this row's error
            raise _row_error(RowFault.PROMPT_TEMPLATE, self._fault_message(error, columns)) from None

    def _null_message(self, columns: Mapping[str, Any]) -> str:
        nulls = [name for name in self.names if columns.get(name, "") is None]
        found = f"the column {', '.join(map(shown, nulls))} is null" if nulls else "an expression gave null"
        return f"{self.where}: {found}; {{{{ x or '' }}}} allows that"

    def _fault_message(self, error: Exception, columns: Mapping[str, Any]) -> str:
        message = f"{self.where}: {str(error)[:500] or type(error).__name__}"
        if isinstance(error, jinja2.UndefinedError):
            message += f"; the row has: {', '.join(list(map(shown, columns))[:50])}"
        return message


@lru_cache(maxsize=64)
def _compiled(where: str, source: str) -> _Template:
    """A template of the job, made once: preflight, plan and encoder each ask for it."""
    return _Template(where, source)


def _joined(pieces: Iterable[str]) -> str:
    """The pieces as one text, refused as soon as it is too long."""
    kept, num_bytes = [], 0
    for piece in pieces:
        num_bytes += len(piece.encode())  # half a surrogate pair fails here, not in the tokenizer
        if num_bytes > MAX_PROMPT_BYTES:
            raise _row_error(
                RowFault.PROMPT_TOO_LONG, f"the rendered prompt is over {MAX_PROMPT_BYTES} bytes"
            )
        kept.append(piece)
    return "".join(kept)
