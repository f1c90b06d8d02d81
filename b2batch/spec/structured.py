"""The ``structured_outputs`` section of a job file: what every answer must look like."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from b2batch.spec.processors import import_object
from b2batch.spec.section import Section


def _as_schema(value: Any) -> Any:
    """A JSON schema as it is, or of the pydantic model that ``package.module:Class`` names."""
    if not isinstance(value, str):
        return value
    model = import_object(value)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ValueError(f"{value} is not a pydantic model")
    return model.model_json_schema()


with warnings.catch_warnings():  # `json` is the name of a method of BaseModel that nobody calls
    warnings.filterwarnings("ignore", 'Field name "json"', UserWarning)

    class StructuredOutputsSpec(Section):
        """What every answer must look like: at most one of the three.

        ``json`` is a JSON schema, or ``package.module:Class`` of a pydantic model.
        """

        choice: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
        regex: str | None = Field(default=None, min_length=1)
        json: Annotated[Mapping[str, Any], BeforeValidator(_as_schema)] | None = None  # type: ignore[assignment]

        @model_validator(mode="after")
        def _one_form(self) -> Self:
            given = [name for name in ("choice", "regex", "json") if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"at most one of choice, regex and json, found {' and '.join(given)}")
            return self

        @property
        def is_set(self) -> bool:
            """Whether answers are bound at all."""
            return (self.choice, self.regex, self.json) != (None, None, None)
