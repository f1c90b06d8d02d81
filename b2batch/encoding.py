"""A row → the request that the engine gets, or the error that the row gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from b2batch.engine.request import AnyRequest, EmbedRequest, Request, ScoreRequest
from b2batch.errors import RowError, RowFault, SpecError, Stage
from b2batch.inputs.prompts import Prompt, PromptRenderer
from b2batch.labelling.grammar import grammar_of, schema_grammar
from b2batch.models.chat import input_budget
from b2batch.models.families import PromptCodec
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec, SamplingSpec

_FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "do_sample")

_OF_JOB = {"n", "logprobs", "from_model", "num_return_sequences"}  # they make columns


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's request, and whether ``prompt.on_too_long`` cut its prompt."""

    request: AnyRequest
    prompt_truncated: bool


class RowEncoder:
    """Renders and tokenises rows of one job, and settles what is asked of the engine about each.

    Raises:
        SpecError: the prompt settings and the model do not go together.
    """

    def __init__(self, spec: JobSpec, codec: PromptCodec, generation_config: Mapping[str, Any]) -> None:
        self._spec = spec
        self._prompt = spec.prompt
        self._sampling_column = "sampling" if spec.has_batch_lines else spec.input.sampling_column
        self._renderer = PromptRenderer.of(spec)
        self._codec = codec
        self._sampling = sampling_of(spec.sampling, generation_config)
        self._uses_chat = codec.chat is not None if spec.prompt.chat == "auto" else spec.prompt.chat
        if spec.prompt.chat is True and codec.chat is None:
            raise SpecError("prompt.chat: true, but the model has no chat format (it is a base model)")
        if spec.prompt.messages is not None and not self._uses_chat:
            raise SpecError("prompt.messages needs a chat model, or prompt.chat: true")
        if self._uses_chat and spec.prompt.on_too_long == "truncate_right":
            raise SpecError(
                "prompt.on_too_long: truncate_right would cut the turn that asks for an answer; "
                "for chat prompts use truncate_left"
            )
        self._grammar = grammar_of(spec.structured_outputs)
        self._label_texts = tuple(label.text for label in spec.labels)
        self._priors = [self._prior_request(text) for text in spec.classify.calibrate_with]

    @property
    def sampling(self) -> SamplingSpec:
        """The job's sampling, the checkpoint's own settled in."""
        return self._sampling

    @property
    def uses_chat(self) -> bool:
        """Whether prompts go through the model's chat format."""
        return self._uses_chat

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the context that a prompt must leave for its answer."""
        if self._spec.task == "generate":
            return self._sampling.max_tokens or 1
        return max((len(self._codec.tokenizer.encode(text)) for text in self._label_texts), default=0)

    def render(self, row: PromptRow) -> Prompt:
        """The prompt of a row before it is tokenised; RowError as ``PromptRenderer.render``."""
        return self._renderer.render(row.columns, row.tick)

    def encode(self, row: PromptRow) -> EncodedRow:
        """The request of a row, named by its ``row_id``.

        Raises:
            RowError: the row has no usable prompt, or one that is too long.
        """
        prompt = self.render(row)
        if self._spec.task == "generate":
            sampling = self._row_sampling(row)
            ids, is_cut = self._fitted(prompt, self._encode_prompt(prompt), sampling.max_tokens or 1, 1)
            return EncodedRow(Request(row.row_id, ids, sampling, self._grammar_of(row)), is_cut)
        if self._spec.task == "embed":
            ids, is_cut = self._fitted(prompt, self._encode_prompt(prompt), 0, 0)
            return EncodedRow(EmbedRequest(row.row_id, ids, self._spec.embed.pooling), is_cut)
        texts = self._label_texts or (self._scored_text(row),)
        return self._encode_scored(row.row_id, prompt, texts)

    def _grammar_of(self, row: PromptRow) -> str | None:
        schema = row.columns.get("json_schema") if self._spec.has_batch_lines else None
        if schema is None:
            return self._grammar
        try:
            return schema_grammar(schema)
        except SpecError as error:
            raise _encode_error(RowFault.SAMPLING, f"body.response_format: {error}") from None

    def prior_requests(self) -> list[ScoreRequest]:
        """What ``classify.calibrate_with`` asks: the labels after prompts without content."""
        return self._priors

    def _prior_request(self, text: str) -> ScoreRequest:
        columns = dict.fromkeys(self._renderer.column_names, text)
        try:
            prompt = self._renderer.render(columns, self._spec.tick)
            request = self._encode_scored(f"prior {text!r}", prompt, self._label_texts).request
        except RowError as error:
            raise SpecError(f"classify.calibrate_with: {text!r} gives no prompt: {error}") from None
        assert isinstance(request, ScoreRequest)
        return request

    def _scored_text(self, row: PromptRow) -> str:
        name = str(self._spec.score.column)
        value = row.columns.get(name)
        if value is None:
            raise _encode_error(RowFault.PROMPT_MISSING, f"score.column: {name!r} is null or missing")
        if not isinstance(value, str):
            found = type(value).__name__
            raise _encode_error(RowFault.PROMPT_TYPE, f"score.column: {name!r} holds {found}, expected text")
        if not value:
            raise _encode_error(RowFault.PROMPT_EMPTY, f"score.column: {name!r} is empty")
        return value

    def _encode_scored(self, request_id: str, prompt: Prompt, texts: Sequence[str]) -> EncodedRow:
        """The prompt, and the tokens that each text adds to it."""
        if self._is_chat(prompt):
            whole = self._encode_prompt(prompt)
            continuations = [self._encode(text) for text in texts]
        else:
            whole, continuations = self._encode_jointly(_text_of(prompt), texts)
        room = max(map(len, continuations))
        ids, is_cut = self._fitted(prompt, whole, room, room)
        return EncodedRow(ScoreRequest(request_id, ids, continuations), is_cut)

    def _encode_jointly(self, context: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokens of a context, and of each text as it is tokenised behind it.

        As lm-evaluation-harness does it: white space at the context's end goes to the texts, both are
        tokenised together, and what is longer than the context alone is the text's. A context of
        nothing is the token that begins a document.
        """
        tokenizer, allow_special = self._codec.tokenizer, self._prompt.allow_special_tokens
        kept = context.rstrip()
        context, texts = kept, [context[len(kept) :] + text for text in texts]
        ids = tokenizer.encode_prompt(context, allow_special=allow_special)
        wholes = [tokenizer.encode_prompt(context + text, allow_special=allow_special) for text in texts]
        continuations = [
            whole[len(ids) :] or self._encode(text) for whole, text in zip(wholes, texts, strict=True)
        ]
        return ids or [tokenizer.first_token_id], continuations

    def _fitted(self, prompt: Prompt, whole: list[int], room: int, needed: int) -> tuple[list[int], bool]:
        """The prompt's ids, cut where allowed to leave ``room`` tokens, and whether they were.

        Raises:
            RowError: not even the ``needed`` tokens are left.
        """
        ids = self._shorten(whole, prompt, room)
        if not ids:
            raise _encode_error(RowFault.PROMPT_EMPTY, "the prompt has no tokens")
        context = self._codec.max_model_len
        if len(ids) + needed > context:
            raise _encode_error(
                RowFault.PROMPT_TOO_LONG,
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer "
                f"in a context of {context}",
            )
        return ids, len(ids) < len(whole)

    def _is_chat(self, prompt: Prompt) -> bool:
        """A batch line for ``/v1/completions`` is plain text also for a chat model."""
        return self._uses_chat and not (self._spec.has_batch_lines and prompt.text is not None)

    def _encode_prompt(self, prompt: Prompt) -> list[int]:
        if not self._is_chat(prompt):
            return self._codec.tokenizer.encode_prompt(
                _text_of(prompt), allow_special=self._prompt.allow_special_tokens
            )
        assert self._codec.chat is not None
        return self._codec.chat.encode(_turns(prompt), allow_special=self._prompt.allow_special_tokens)

    def _encode(self, text: str) -> list[int]:
        return self._codec.tokenizer.encode(text, allow_special=self._prompt.allow_special_tokens)

    def _shorten(self, ids: list[int], prompt: Prompt, room: int) -> list[int]:
        """``ids``, cut as ``on_too_long`` says where they leave less than ``room`` tokens."""
        context = self._codec.max_model_len
        if self._prompt.on_too_long == "error" or len(ids) <= context - room:
            return ids
        if self._is_chat(prompt):
            assert self._codec.chat is not None
            return self._codec.chat.encode_newest(
                _turns(prompt),
                max_model_len=context,
                max_new_tokens=room,
                allow_special=self._prompt.allow_special_tokens,
            )
        budget = input_budget(context, room)
        return ids[-budget:] if self._prompt.on_too_long == "truncate_left" else ids[:budget]

    def _row_sampling(self, row: PromptRow) -> SamplingSpec:
        """The job's sampling with the row's own overrides."""
        if self._sampling_column is None:
            return self._sampling
        overrides = row.columns.get(self._sampling_column)
        if overrides is None:
            return self._sampling
        if not isinstance(overrides, Mapping):
            found = type(overrides).__name__
            raise _encode_error(
                RowFault.SAMPLING,
                f"{self._sampling_column}: expected an object of sampling keys, found {found}",
            )
        given = {key: value for key, value in overrides.items() if value is not None}
        of_job = {"from_model"} if self._spec.has_batch_lines else _OF_JOB
        fixed = of_job & given.keys()
        if fixed:
            raise _encode_error(
                RowFault.SAMPLING, f"{self._sampling_column}: {sorted(fixed)[0]} is the whole job's"
            )
        try:
            own = SamplingSpec.model_validate(given)
            return SamplingSpec.model_validate(
                self._sampling.model_dump() | {key: getattr(own, key) for key in own.model_fields_set}
            )
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join([self._sampling_column, *map(str, fault["loc"])])
            raise _encode_error(
                RowFault.SAMPLING, f"{where}: {fault['msg']}, found {fault['input']!r}"
            ) from None


def _encode_error(fault: RowFault, message: str) -> RowError:
    return RowError(fault, message, Stage.ENCODE)


def _text_of(prompt: Prompt) -> str:
    if prompt.text is None:
        raise _encode_error(
            RowFault.PROMPT_TYPE, "the prompt is a list of messages, but the model has no chat format"
        )
    return prompt.text


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    return [asdict(message) for message in prompt.messages]


def sampling_of(spec: SamplingSpec, generation_config: Mapping[str, Any]) -> SamplingSpec:
    """The job's sampling; with ``from_model`` the checkpoint's own where the job says nothing."""
    if not spec.from_model:
        return spec
    theirs = {key: generation_config[key] for key in _FROM_MODEL if generation_config.get(key) is not None}
    try:
        defaults = SamplingSpec.model_validate(theirs)
    except ValidationError as error:
        raise SpecError(f"sampling.from_model: the checkpoint's generation_config.json: {error}") from error
    kept = {key: getattr(defaults, key) for key in defaults.model_fields_set}
    return SamplingSpec.model_validate(kept | {key: getattr(spec, key) for key in spec.model_fields_set})
