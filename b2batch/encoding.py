"""A row → the request that the engine gets, or the error that the row gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from b2batch.engine.request import Request
from b2batch.errors import RowError, RowFault, SpecError, Stage
from b2batch.inputs.prompts import Prompt, PromptRenderer
from b2batch.models.chat import input_budget
from b2batch.models.families import PromptCodec
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec, SamplingSpec

_FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "do_sample")


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row's request, and whether ``prompt.on_too_long`` cut its prompt."""

    request: Request
    prompt_truncated: bool


class RowEncoder:
    """Renders, tokenises and settles the sampling of rows of one job.

    Raises:
        SpecError: the prompt settings and the model do not go together.
    """

    def __init__(self, spec: JobSpec, codec: PromptCodec, generation_config: Mapping[str, Any]) -> None:
        self._prompt = spec.prompt
        self._sampling_column = spec.input.sampling_column
        self._renderer = PromptRenderer(spec.prompt)
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

    @property
    def sampling(self) -> SamplingSpec:
        """The job's sampling, the checkpoint's own settled in."""
        return self._sampling

    @property
    def uses_chat(self) -> bool:
        """Whether prompts go through the model's chat format."""
        return self._uses_chat

    def render(self, row: PromptRow) -> Prompt:
        """The prompt of a row before it is tokenised; RowError as ``PromptRenderer.render``."""
        return self._renderer.render(row.columns)

    def encode(self, row: PromptRow) -> EncodedRow:
        """The request of a row, named by its ``row_id``.

        Raises:
            RowError: the row has no usable prompt, or one that is too long.
        """
        prompt = self.render(row)
        sampling = self._row_sampling(row)
        whole = self._encode_chat(prompt) if self._uses_chat else self._encode_text(prompt)
        ids = self._shorten(whole, prompt, sampling)
        if not ids:
            raise RowError(RowFault.PROMPT_EMPTY, "the prompt has no tokens", Stage.ENCODE)
        context = self._codec.max_model_len
        if len(ids) >= context:
            raise RowError(
                RowFault.PROMPT_TOO_LONG,
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer "
                f"in a context of {context}",
                Stage.ENCODE,
            )
        return EncodedRow(Request(row.row_id, ids, sampling), len(ids) < len(whole))

    def _encode_chat(self, prompt: Prompt) -> list[int]:
        assert self._codec.chat is not None
        return self._codec.chat.encode(_turns(prompt), allow_special=self._prompt.allow_special_tokens)

    def _encode_text(self, prompt: Prompt) -> list[int]:
        if prompt.text is None:
            raise RowError(
                RowFault.PROMPT_TYPE,
                "the prompt is a list of messages, but the model has no chat format",
                Stage.ENCODE,
            )
        return self._codec.tokenizer.encode_prompt(
            prompt.text, allow_special=self._prompt.allow_special_tokens
        )

    def _shorten(self, ids: list[int], prompt: Prompt, sampling: SamplingSpec) -> list[int]:
        """``ids``, cut as ``on_too_long`` says where they leave no room for ``max_tokens``."""
        context, max_tokens = self._codec.max_model_len, sampling.max_tokens or 1
        if self._prompt.on_too_long == "error" or len(ids) <= context - max_tokens:
            return ids
        if self._uses_chat:
            assert self._codec.chat is not None
            return self._codec.chat.encode_newest(
                _turns(prompt),
                max_model_len=context,
                max_new_tokens=max_tokens,
                allow_special=self._prompt.allow_special_tokens,
            )
        room = input_budget(context, max_tokens)
        return ids[-room:] if self._prompt.on_too_long == "truncate_left" else ids[:room]

    def _row_sampling(self, row: PromptRow) -> SamplingSpec:
        """The job's sampling with the row's own overrides."""
        if self._sampling_column is None:
            return self._sampling
        overrides = row.columns.get(self._sampling_column)
        if overrides is None:
            return self._sampling
        if not isinstance(overrides, Mapping):
            found = type(overrides).__name__
            raise RowError(
                RowFault.SAMPLING,
                f"{self._sampling_column}: expected an object of sampling keys, found {found}",
                Stage.ENCODE,
            )
        given = {key: value for key, value in overrides.items() if value is not None}
        fixed = {"n", "logprobs", "from_model", "num_return_sequences"} & given.keys()
        if fixed:
            raise RowError(
                RowFault.SAMPLING,
                f"{self._sampling_column}: {sorted(fixed)[0]} is the whole job's",
                Stage.ENCODE,
            )
        try:
            own = SamplingSpec.model_validate(given)
            return SamplingSpec.model_validate(
                self._sampling.model_dump() | {key: getattr(own, key) for key in own.model_fields_set}
            )
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join([self._sampling_column, *map(str, fault["loc"])])
            raise RowError(
                RowFault.SAMPLING, f"{where}: {fault['msg']}, found {fault['input']!r}", Stage.ENCODE
            ) from None


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
