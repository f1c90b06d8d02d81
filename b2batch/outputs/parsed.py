"""A JSON schema → the Arrow type of the ``parsed`` column, and a JSON value → what that type takes.

Arrow has one type a column, so a schema that allows values of several kinds in one place, objects
with unnamed members beside named ones, or objects within themselves has no column and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa

from b2batch.errors import SpecError

_SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_SAFE_INTEGER = (1 << 53) - 1
_INT64 = range(-(1 << 63), 1 << 63)


def arrow_type(schema: Mapping[str, Any]) -> pa.DataType:
    """The column type of what a JSON schema describes.

    Raises:
        SpecError: it has none; names the place in the schema.
    """
    type_ = _TypeReader(schema).read(schema, "", ())
    if type_ is None:
        raise _untyped("", "only null is allowed")
    return type_


def closed(schema: Any) -> Any:
    """``schema`` less what no column could hold.

    An object that names its members allows no others; an integer without bounds has those within which
    JSON readers agree on every integer (RFC 8259).
    """
    if isinstance(schema, Mapping):
        inner = {key: _closed_member(key, value) for key, value in schema.items()}
        if "integer" in _kinds(schema):
            inner = _bounded(inner)
        has_members = isinstance(schema.get("properties"), Mapping) and "$ref" not in schema
        return {"additionalProperties": False, **inner} if has_members else inner
    return [closed(item) for item in schema] if isinstance(schema, list | tuple) else schema


def _kinds(schema: Mapping[str, Any]) -> list[Any]:
    kinds = schema.get("type")
    return list(kinds) if isinstance(kinds, list | tuple) else [kinds]


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    low = {} if {"minimum", "exclusiveMinimum"} & schema.keys() else {"minimum": -_SAFE_INTEGER}
    high = {} if {"maximum", "exclusiveMaximum"} & schema.keys() else {"maximum": _SAFE_INTEGER}
    return {**schema, **low, **high}


def _closed_member(key: str, value: Any) -> Any:
    if key == "$ref" and isinstance(value, str):
        return quote(value, safe="#/$%~")  # a URI reference is ASCII, whatever it names
    if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
        return {name: closed(inner) for name, inner in value.items()}
    return value if key in ("enum", "const") else closed(value)


def conform(value: Any, type_: pa.DataType) -> Any:
    """``value`` as Arrow takes it for ``type_``.

    Raises:
        ValueError: it does not fit the type.
    """
    if value is None:
        return None
    if pa.types.is_struct(type_):
        members = {field.name: field.type for field in type_}
        _expect(isinstance(value, Mapping) and value.keys() <= members.keys(), value, type_)
        return {name: conform(inner, members[name]) for name, inner in value.items()}
    if pa.types.is_map(type_):
        _expect(isinstance(value, Mapping), value, type_)
        return [(_text(key), conform(inner, type_.item_type)) for key, inner in value.items()]
    if pa.types.is_list(type_):
        _expect(isinstance(value, list), value, type_)
        return [conform(inner, type_.value_type) for inner in value]
    return _conform_scalar(value, type_)


def _conform_scalar(value: Any, type_: pa.DataType) -> Any:
    if pa.types.is_string(type_):
        _expect(isinstance(value, str), value, type_)
        return _text(value)
    if pa.types.is_boolean(type_):
        _expect(isinstance(value, bool), value, type_)
        return value
    _expect(isinstance(value, int | float) and not isinstance(value, bool), value, type_)
    if pa.types.is_floating(type_):
        return _as_float(value)
    _expect(value == int(value) and int(value) in _INT64, value, type_)
    return int(value)


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number is larger than a double can hold") from None


def _text(value: str) -> str:
    value.encode()  # half a surrogate pair has no bytes, and is a ValueError
    return value


def _expect(holds: bool, value: Any, type_: pa.DataType) -> None:
    if not holds:
        shown = json.dumps(value, ensure_ascii=False, default=str)[:100]
        raise ValueError(f"{shown} does not fit the column type {type_}")


class _TypeReader:
    """Reads the types of one schema document, whose definitions ``$ref`` points to."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def read(self, schema: Any, where: str, refs: tuple[str, ...]) -> pa.DataType | None:
        """The type at ``where``, None if only null is allowed; ``refs`` are those it lies within."""
        if not isinstance(schema, Mapping):
            raise _untyped(where, "anything is allowed")
        if "$ref" in schema:
            return self._read_ref(str(schema["$ref"]), where, refs)
        if "enum" in schema or "const" in schema:
            return _type_of_values(schema.get("enum", [schema.get("const")]), where)
        for word in ("anyOf", "oneOf", "allOf"):
            if word in schema:
                parts = [self.read(part, f"{where}/{word}/{i}", refs) for i, part in enumerate(schema[word])]
                return _merge(parts, where, joins_members=word == "allOf")
        return self._read_typed(schema, where, refs)

    def _read_ref(self, ref: str, where: str, refs: tuple[str, ...]) -> pa.DataType | None:
        if ref in refs:
            raise _untyped(where, f"{ref} lies within itself")
        target: Any = self._document
        try:
            for step in filter(None, unquote(ref).removeprefix("#").split("/")):
                target = target[step.replace("~1", "/").replace("~0", "~")]
        except (KeyError, TypeError):
            raise _untyped(where, f"there is no {ref}") from None
        return self.read(target, where, (*refs, ref))

    def _read_typed(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> pa.DataType | None:
        kinds = schema.get("type") or [kind for kind, word in _IMPLIED.items() if word in schema]
        if isinstance(kinds, str):
            kinds = [kinds]
        if not kinds:
            raise _untyped(where, "anything is allowed")
        return _merge([self._read_kind(kind, schema, where, refs) for kind in kinds], where)

    def _read_kind(
        self, kind: str, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]
    ) -> pa.DataType | None:
        if kind == "null":
            return None
        if kind == "object":
            return self._read_object(schema, where, refs)
        if kind == "array":
            if "prefixItems" in schema or "items" not in schema:
                raise _untyped(where, "an array needs `items`, one schema for all of them")
            return pa.list_(self._member(schema["items"], f"{where}/items", refs))
        if kind not in _SCALARS:
            raise _untyped(where, f"there is no type {kind!r}")
        return _SCALARS[kind]

    def _read_object(self, schema: Mapping[str, Any], where: str, refs: tuple[str, ...]) -> pa.DataType:
        members, others = schema.get("properties") or {}, schema.get("additionalProperties", False)
        if schema.get("patternProperties") or (members and others is not False):
            raise _untyped(where, "members without a name of their own beside `properties`")
        if members:
            return pa.struct(
                {name: self._member(m, f"{where}/properties/{name}", refs) for name, m in members.items()}
            )
        if others is False:
            raise _untyped(where, "an object without members")
        return pa.map_(pa.string(), self._member(others, f"{where}/additionalProperties", refs))

    def _member(self, schema: Any, where: str, refs: tuple[str, ...]) -> pa.DataType:
        type_ = self.read(schema, where, refs)
        if type_ is None:
            raise _untyped(where, "only null is allowed")
        return type_


_IMPLIED = {"object": "properties", "array": "items"}


def _type_of_values(values: Sequence[Any], where: str) -> pa.DataType | None:
    kinds = {
        bool: pa.bool_(),
        str: pa.string(),
        int: pa.int64(),
        float: pa.float64(),
    }
    found = [kinds.get(type(value)) for value in values if value is not None]
    if any(type_ is None for type_ in found):
        raise _untyped(where, "an enum of arrays or objects")
    return _merge([*found], where)


def _merge(
    types: Sequence[pa.DataType | None], where: str, *, joins_members: bool = False
) -> pa.DataType | None:
    """The one type of several alternatives; null takes part in every type."""
    distinct = list(dict.fromkeys(type_ for type_ in types if type_ is not None))
    if len(distinct) <= 1:
        return distinct[0] if distinct else None
    if set(distinct) == {pa.int64(), pa.float64()}:
        return pa.float64()
    if joins_members and all(map(pa.types.is_struct, distinct)):
        return pa.struct({field.name: field.type for type_ in distinct for field in type_})
    raise _untyped(where, f"values of several kinds: {', '.join(map(str, distinct))}")


def _untyped(where: str, reason: str) -> SpecError:
    return SpecError(f"structured_outputs.json: {where or '/'}: no column type fits: {reason}")
