"""The ``notify`` section of a job file: who is told how a job ended."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Event = Literal["finish", "failure", "budget", "stopped"]
_REFERENCE = re.compile(r"\$\{env:[A-Za-z_][A-Za-z0-9_]*\}")


def _as_secret(url: str) -> str:
    """Who knows a webhook's URL can post there, and the job file is kept with the run: no URL in plain."""
    if not _REFERENCE.search(url):
        raise ValueError(
            "the URL of a webhook is a secret, and would be written down with the run: put it in the "
            "environment of the driver, and write ${env:NAME} here"
        )
    return url


def _as_events(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class WebhookSpec(BaseModel):
    """One place that is told. Row content goes there only as far as ``include_sample`` says.

    The key is not ``on``, which YAML reads as a truth value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: Annotated[str, AfterValidator(_as_secret)]
    events: Annotated[tuple[Event, ...], BeforeValidator(_as_events)] = Field(
        default=("finish", "failure", "budget"), min_length=1
    )
    allow_private: bool = Field(
        default=False, description="may it reach addresses that are not of the public internet"
    )
    include_sample: int = Field(
        default=0, ge=0, le=10, description="first rows whose answers are told, and the error's own words"
    )
