"""The types of JSON columns: told from values, unified over rows and files, and held against later rows.

A kind is a point in a small lattice: ``NULL`` is below everything, ``JSON`` (JSON text in a string
column) above everything. An Arrow field and a kind turn into each other; a field that holds JSON text
is marked in its metadata, since as a type it is a plain string.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from b2batch.inputs.strict_json import json_type, shown, to_json

MAX_TYPE_DEPTH = 16
_JSON_MARK = {b"b2batch": b"json"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A scalar by ``name``, or a list of ``element``, or a struct of ``fields`` (in order)."""

    name: str
    element: Kind | None = None
    fields: tuple[tuple[str, Kind], ...] = ()


NULL, BOOL, FLOAT, TEXT, JSON = (Kind(name) for name in ("null", "bool", "float", "text", "json"))
NATURAL = Kind("natural")  # 0 to 2^63 - 1, which both integer types hold
SIGNED = Kind("signed")
UNSIGNED = Kind("unsigned")
FOREIGN = Kind("foreign")  # an Arrow type that no JSON value has: only null fits

_ARROW_TYPES = {
    "bool": pa.bool_(),
    "natural": pa.int64(),
    "signed": pa.int64(),
    "unsigned": pa.uint64(),
    "float": pa.float64(),
    "text": pa.string(),
    "json": pa.string(),
    "null": pa.null(),
}
_SCALARS: dict[type, Kind] = {str: TEXT, bool: BOOL, float: FLOAT, type(None): NULL}
_JOINS = {
    frozenset((NATURAL, SIGNED)): SIGNED,
    frozenset((NATURAL, UNSIGNED)): UNSIGNED,
    frozenset((NATURAL, FLOAT)): FLOAT,
    frozenset((SIGNED, FLOAT)): FLOAT,
    frozenset((UNSIGNED, FLOAT)): FLOAT,
}


def kind_of(value: Any, depth: int = 0) -> Kind:
    """The kind of one JSON value that stands ``depth`` containers deep in its column.

    ``JSON`` is also the kind of an object without keys, as Parquet has no empty struct, and of what
    is nested deeper than ``MAX_TYPE_DEPTH``, as readers of Parquet refuse very deep types.
    """
    scalar = _SCALARS.get(type(value))
    if scalar is not None:
        return scalar
    if isinstance(value, int):
        return SIGNED if value < 0 else NATURAL if value < 1 << 63 else UNSIGNED
    if (not isinstance(value, list) and not value) or depth == MAX_TYPE_DEPTH:
        return JSON
    if isinstance(value, list):
        element = NULL
        for item in value:
            element = unify(element, kind_of(item, depth + 1))
        return Kind("list", element=element)
    return Kind("struct", fields=tuple((key, kind_of(item, depth + 1)) for key, item in value.items()))


def unify(a: Kind, b: Kind) -> Kind:
    """The least kind that holds both. Objects with different keys are ``JSON``, which keeps them exactly."""
    if a is b or a == b or b is NULL:
        return a
    if a is NULL:
        return b
    if a.element and b.element:
        return Kind("list", element=unify(a.element, b.element))
    if a.fields and b.fields:
        return _unify_structs(dict(a.fields), dict(b.fields))
    return _JOINS.get(frozenset((a, b)), JSON)


def _unify_structs(a: Mapping[str, Kind], b: Mapping[str, Kind]) -> Kind:
    if a.keys() != b.keys():
        return JSON
    return Kind("struct", fields=tuple((key, unify(kind, b[key])) for key, kind in a.items()))


def to_field(name: str, kind: Kind) -> pa.Field:
    """The Arrow field of a column of this kind."""
    if kind.element:
        return pa.field(name, pa.list_(to_field("item", kind.element)))
    if kind.fields:
        return pa.field(name, pa.struct([to_field(key, inner) for key, inner in kind.fields]))
    return pa.field(name, _ARROW_TYPES[kind.name], metadata=_JSON_MARK if kind == JSON else None)


def from_field(field: pa.Field) -> Kind:
    """The kind of the JSON values that an Arrow field takes, ``FOREIGN`` if there are none."""
    arrow = field.type
    if pa.types.is_list(arrow):
        return _if_native(Kind("list", element=from_field(arrow.value_field)))
    if pa.types.is_struct(arrow) and arrow.num_fields:
        inner = tuple((arrow.field(i).name, from_field(arrow.field(i))) for i in range(arrow.num_fields))
        return _if_native(Kind("struct", fields=inner))
    if pa.types.is_string(arrow) or pa.types.is_large_string(arrow):
        return JSON if (field.metadata or {}).get(b"b2batch") == b"json" else TEXT
    return _KINDS_BY_TYPE.get(arrow, FOREIGN)


_KINDS_BY_TYPE = {
    pa.null(): NULL,
    pa.bool_(): BOOL,
    pa.int64(): SIGNED,
    pa.uint64(): UNSIGNED,
    pa.float64(): FLOAT,
}


def _if_native(kind: Kind) -> Kind:
    inner = [kind.element] if kind.element else [child for _, child in kind.fields]
    return FOREIGN if FOREIGN in inner else kind


def settle(kind: Kind) -> Kind:
    """``kind`` with ``JSON`` for each ``NULL``: where no row had a value, a later one may have any."""
    if kind.element:
        return Kind("list", element=settle(kind.element))
    if kind.fields:
        return Kind("struct", fields=tuple((key, settle(inner)) for key, inner in kind.fields))
    return JSON if kind is NULL else kind


class Misfit(Exception):
    """A value that its column cannot hold; the message says where, what is expected and what was found."""


def fit(value: Any, kind: Kind, where: str) -> Any:
    """``value`` as its column stores it: JSON text where the column holds that, else unchanged.

    Raises:
        Misfit: the value is of another kind; ``where`` (and what is below it) names the place.
    """
    if value is None:
        return None
    if kind.name == "json":
        return value if type(value) is str else to_json(value)
    if kind.element and isinstance(value, list):
        return [fit(item, kind.element, f"{where}[]") for item in value]
    if kind.fields and isinstance(value, dict):
        return _fit_struct(value, dict(kind.fields), where)
    if not _fits_scalar(value, kind):
        raise Misfit(f"{where}: expected {_expected(kind)}, found {_found(value)}")
    return float(value) if kind == FLOAT else value


def _fit_struct(value: dict[str, Any], kinds: Mapping[str, Kind], where: str) -> dict[str, Any]:
    for key in value:
        if key not in kinds:
            raise Misfit(f"{where}: the key {shown(key)} is not among {', '.join(map(shown, kinds))}")
    return {key: fit(item, kinds[key], f"{where}.{shown(key)}") for key, item in value.items()}


def _fits_scalar(value: Any, kind: Kind) -> bool:
    if type(value) is not int:
        return _SCALARS.get(type(value)) == kind
    if kind == FLOAT:
        return bool(int(float(value)) == value)
    return (kind == SIGNED and value < 1 << 63) or (kind == UNSIGNED and value >= 0)


def _expected(kind: Kind) -> str:
    return "null" if kind in (FOREIGN, NULL) else str(to_field("", kind).type)


def _found(value: Any) -> str:
    return f"the integer {value}" if type(value) is int else json_type(value)
