"""The ``notify`` section of a job file: who is told how a job ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from b2batch.spec.secrets import ENV_REFERENCE
from b2batch.spec.section import Section, as_list

Event = Literal["finish", "failure", "budget", "stopped"]


def _as_secret(url: str) -> str:
    """Who knows a webhook's URL can post there, and the job file is kept with the run: no URL in plain."""
    if not ENV_REFERENCE.search(url):
        raise ValueError(
            "the URL of a webhook is a secret, and would be written down with the run: put it in the "
            "environment of the driver, and write ${env:NAME} here"
        )
    return url


class WebhookSpec(Section):
    """One place that is told. Row content goes there only as far as ``include_sample`` says.

    The key is not ``on``, which YAML reads as a truth value.
    """

    url: Annotated[str, AfterValidator(_as_secret)]
    events: Annotated[tuple[Event, ...], BeforeValidator(as_list)] = Field(
        default=("finish", "failure", "budget"), min_length=1
    )
    allow_private: bool = Field(
        default=False, description="may it reach addresses that are not of the public internet"
    )
    include_sample: int = Field(
        default=0, ge=0, le=10, description="first rows whose answers are told, and the error's own words"
    )
