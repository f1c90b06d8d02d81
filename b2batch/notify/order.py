"""What goes to the process that sends a message, and what comes back; both travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Message:
    """What is told. ``facts`` are its figures for programs; ``severity`` is apprise's notify type."""

    title: str
    body: str
    severity: str = "info"
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Order:
    """A message for one webhook."""

    url: str
    allow_private: bool
    message: Message


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order. ``detail`` holds no secret; ``may_pass``: another try may help."""

    is_done: bool
    service: str = ""
    detail: str = ""
    may_pass: bool = False
