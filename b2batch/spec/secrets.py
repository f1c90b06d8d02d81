"""``${env:NAME}`` references and the values they stand for, and what in a text is itself a secret.

A reference stays one in the tree; its value is put in at the place of use and taken out again of
whatever is said about it.
"""

from __future__ import annotations

import os
import re

from b2batch.errors import SpecError

ENV_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
# A password, which may hold a slash; host:port/ is none. And a secret in what follows the ?.
_PASSWORD = re.compile(r"://[^/@\s:]*:(?!\d+(?:/|$))[^@\s]+@")
_QUERY_SECRET = re.compile(r"[?&][^=&\s]*(?:secret|token|password|access_key)[^=&\s]*=[^&\s]", re.IGNORECASE)
_SHORTEST_SECRET = 4
_put_in: dict[str, str] = {}  # value → reference, of all that this process resolved


def resolve_env(text: str) -> str:
    """Put the values of ``${env:NAME}`` references into ``text``; SpecError names one that is not set."""

    def value(match: re.Match[str]) -> str:
        try:
            found = os.environ[match[1]]
        except KeyError:
            raise SpecError(f"the environment variable {match[1]}, used as {match[0]}, is not set") from None
        _put_in[found] = match[0]
        return found

    return ENV_REFERENCE.sub(value, text)


def mask_env(text: str) -> str:
    """``text`` with each value that ``resolve_env`` has put in turned back into its reference.

    For what libraries say of a path or URI. Values of under 4 characters, which stand in any text, stay.
    """
    for value in sorted(_put_in, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, _put_in[value])
    return text


def holds_secret(text: str) -> bool:
    """Whether a password or key is written out in ``text``; a reference to one is none."""
    literal = ENV_REFERENCE.sub("", text)
    return bool(_PASSWORD.search(literal) or _QUERY_SECRET.search(literal))
