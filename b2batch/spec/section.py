"""What the sections of a job file have in common: frozen, no unknown keys; places; one text for a list."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from b2batch.spec.secrets import holds_secret


class Section(BaseModel):
    """A part of the job file: frozen, and a key it does not know is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _as_location(text: str) -> str:
    """Refuse a secret, which would be copied into the output's records, into logs and to every node."""
    if "\0" in text:
        raise ValueError("a NUL stands in it, which no path has")
    if holds_secret(text):
        raise ValueError(
            "a password or key stands in it, which would be written down with the run: put it in the "
            "environment of the driver and the nodes, and write ${env:NAME} here"
        )
    return text


Location = Annotated[str, AfterValidator(_as_location)]


def as_list(value: Any) -> Any:
    """A single text where a list is wanted is a list of one."""
    return [value] if isinstance(value, str) else value
