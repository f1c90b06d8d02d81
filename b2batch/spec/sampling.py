"""The ``sampling`` section of a job file: how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from b2batch.spec.section import Section, as_list

SAMPLING_ALIASES = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}


class SamplingSpec(Section):
    """How tokens are chosen; vLLM's key names. ``temperature: 0`` is greedy.

    ``max_tokens: null`` means up to the model's context. ``from_model`` takes what is not given
    here from the checkpoint's ``generation_config.json``.
    """

    from_model: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, description="0 or -1: all tokens")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    stop: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    logprobs: int | None = Field(
        default=None, ge=0, le=100, description="alternatives a token; 0: only its own"
    )
    logit_bias: Mapping[int, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _normalise_aliases(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for alias, name in SAMPLING_ALIASES.items():
            if alias in data:
                if name in data:
                    raise ValueError(f"{alias} is another name of {name}: give one of them")
                data[name] = data.pop(alias)
        do_sample = data.pop("do_sample", None)
        if do_sample is False:
            data["temperature"] = 0.0
        elif do_sample is True:
            data.setdefault("temperature", 1.0)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        return self
