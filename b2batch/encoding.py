"""A row → the request that the engine gets, or the error that the row gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import ValidationError

from b2batch.engine.request import Request
from b2batch.errors import RowError, RowFault, SpecError, Stage
from b2batch.inputs.prompts import Prompt, PromptRenderer
from b2batch.models.families import PromptCodec
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec, SamplingSpec

_FROM_MODEL = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "do_sample")


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

    def render(self, row: PromptRow) -> Prompt:
        """The prompt of a row before it is tokenised; RowError as ``PromptRenderer.render``."""
        return self._renderer.render(row.columns)

    def encode(self, row: PromptRow) -> Request:
        """The request of a row, named by its ``row_id``.

        Raises:
            RowError: the row has no usable prompt, or one that is too long.
        """
        prompt = self.render(row)
        sampling = self._row_sampling(row)
        ids = self._encode_chat(prompt, sampling) if self._uses_chat else self._encode_text(prompt, sampling)
        if not ids:
            raise RowError(RowFault.PROMPT_EMPTY, "the prompt has no tokens", Stage.ENCODE)
        context = self._codec.max_model_len
        if len(ids) >= context:
            raise RowError(
                RowFault.PROMPT_TOO_LONG,
                f"the prompt has {len(ids)} tokens, which leaves no room for an answer in a context of {context}",
                Stage.ENCODE,
            )
        return Request(row.row_id, ids, sampling)

    def _encode_chat(self, prompt: Prompt, sampling: SamplingSpec) -> list[int]:
        chat = self._codec.chat
        assert chat is not None
        messages = [asdict(message) for message in prompt.messages]
        allow_special = self._prompt.allow_special_tokens
        if self._prompt.on_too_long == "error":
            return chat.encode(messages, allow_special=allow_special)
        return chat.encode_newest(
            messages,
            max_model_len=self._codec.max_model_len,
            max_new_tokens=sampling.max_tokens or 1,
            allow_special=allow_special,
        )

    def _encode_text(self, prompt: Prompt, sampling: SamplingSpec) -> list[int]:
        if prompt.text is None:
            raise RowError(
                RowFault.PROMPT_TYPE,
                "the prompt is a list of messages, but the model has no chat format",
                Stage.ENCODE,
            )
        ids = self._codec.tokenizer.encode_prompt(
            prompt.text, allow_special=self._prompt.allow_special_tokens
        )
        room = max(1, self._codec.max_model_len - (sampling.max_tokens or 1))
        match self._prompt.on_too_long:
            case "truncate_left":
                return ids[-room:]
            case "truncate_right":
                return ids[:room]
        return ids

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
