"""One JSON Lines record, read strictly: what is not exactly one JSON object is the row's own error."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from b2batch.errors import RowError, RowFault, Stage

MAX_DEPTH = 100
_MAX_INT_DIGITS = 20
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN = 80
_BOM = "\ufeff"


def parse_record(content: bytes, encoding: str = "utf-8") -> dict[str, Any]:
    """The object that a line holds; ``encoding`` is ``utf-8`` or ``gb18030``.

    Raises:
        RowError: invalid in its encoding, invalid JSON, not an object, a key twice, a number that is not
            finite or beyond 64 bits, nesting over ``MAX_DEPTH``, or half a surrogate pair.
    """
    try:
        text = content.decode(encoding)
        if encoding != "utf-8":
            text = text.removeprefix(_BOM)  # that of UTF-8 is no part of the line
        record = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise _refused(_not_text(error, encoding), RowFault.INPUT_UTF8) from None
    except json.JSONDecodeError as error:
        raise _refused(f"invalid JSON at column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise _refused(f"nested deeper than {MAX_DEPTH}") from None
    if not isinstance(record, dict):
        raise _refused(f"a record must be a JSON object, found {json_type(record)}")
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_depth(record)
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(record)
    return record


def json_type(value: Any) -> str:
    """What JSON calls the type of ``value``."""
    return _JSON_TYPES[type(value)]


def to_json(value: Any) -> str:
    """``value`` as compact JSON text, in its own script."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def shown(name: str) -> str:
    """A key or other text of the data, quoted and cut for a message."""
    return ascii(name) if len(name) <= _SHOWN and not name.isprintable() else repr(name[:_SHOWN])


_JSON_TYPES = {
    dict: "object",
    list: "array",
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}


def _not_text(error: UnicodeDecodeError, encoding: str) -> str:
    hint = "; is the file GB18030? then set input.encoding" if encoding == "utf-8" else ""
    return f"invalid {encoding.upper()} at byte {error.start}: {error.reason}{hint}"


def _refused(message: str, fault: RowFault = RowFault.INPUT_JSON) -> RowError:
    return RowError(fault, message, Stage.READ)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _refused(f"the key {shown(twice)} stands twice in one object")
    return found


def _integer(digits: str) -> int:
    if len(digits) <= _MAX_INT_DIGITS and -(1 << 63) <= (value := int(digits)) < 1 << 64:
        return value
    raise _refused(f"the integer {digits[:30]} does not fit in 64 bits")


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _refused(f"the number {digits[:30]} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise _refused(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
)


def _check_depth(record: dict[str, Any]) -> None:
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        inner = [value for container in level for value in _children(container)]
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise _refused(f"nested deeper than {MAX_DEPTH}")


def _children(container: dict[str, Any] | list[Any]) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else container


def _check_surrogates(record: dict[str, Any]) -> None:
    try:
        to_json(record).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise _refused(f"{half} is half of a surrogate pair, no character", RowFault.INPUT_UNICODE) from None
