"""One schema for all input files, and the check that a job names only columns that are there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import pyarrow as pa

from b2batch.errors import InputError, SpecError
from b2batch.inputs.files import FoundFile, InputFile
from b2batch.inputs.kinds import FOREIGN, NULL, Kind, from_field, settle, to_field, unify


class SchemaBuilder:
    """Unifies the schemas of the files as they are scanned.

    JSON Lines columns unify by value kinds and never conflict. Parquet files must have the same
    column names, and types that widen into one another.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Kind] = {}
        self._fields: dict[str, pa.Field] | None = None
        self._first = ""

    def add(self, file: InputFile, schema: pa.Schema) -> None:
        """Take in the columns of a scanned file; InputError as ``add_arrow``."""
        if file.format == "parquet":
            self.add_arrow(file, schema)
        else:
            self.add_json(schema)

    def add_json(self, schema: pa.Schema) -> None:
        """Take in the columns of a JSON Lines file."""
        for field in schema:
            self._kinds[field.name] = unify(self._kinds.get(field.name, NULL), from_field(field))

    def add_arrow(self, file: FoundFile, schema: pa.Schema) -> None:
        """Take in the columns of a Parquet file.

        Raises:
            InputError: they do not agree with those of a file before it.
        """
        fields = {field.name: _plain(field) for field in schema}
        if self._fields is None:
            self._fields, self._first = fields, file.uri
            return
        for name in [*self._fields, *fields]:
            if name not in fields or name not in self._fields:
                owner, other = (self._first, file.uri) if name in self._fields else (file.uri, self._first)
                raise InputError(f"the column {name!r} is in {owner} but not in {other}")
            self._fields[name] = self._widen(name, self._fields[name], fields[name], file.uri)

    def _widen(self, name: str, a: pa.Field, b: pa.Field, uri: str) -> pa.Field:
        if {_is_integer(a), _is_integer(b)} == {True, False} and pa.types.is_floating(
            (b if _is_integer(a) else a).type
        ):
            return pa.field(name, pa.float64())  # Arrow's own choice beside float32 loses digits
        try:
            return pa.unify_schemas([pa.schema([a]), pa.schema([b])], promote_options="permissive").field(0)
        except pa.ArrowException:
            raise InputError(
                f"the column {name!r} is {a.type} in {self._first} but {b.type} in {uri}"
            ) from None

    def schema(self) -> pa.Schema:
        """The schema of all files together.

        Raises:
            InputError: a column is of one type in JSON Lines and of another in Parquet.
        """
        arrow = dict(self._fields or {})
        for name, kind in self._kinds.items():
            arrow[name] = self._mixed(name, kind, arrow.get(name))
        return pa.schema(list(arrow.values()))

    def _mixed(self, name: str, kind: Kind, parquet: pa.Field | None) -> pa.Field:
        if parquet is None:
            return to_field(name, settle(kind))
        if kind is NULL:
            return parquet
        field = self._widen(name, parquet, to_field(name, kind), "a JSON Lines input").with_metadata(
            to_field(name, kind).metadata
        )
        if from_field(field) == FOREIGN:
            raise InputError(
                f"the column {name!r}: {parquet.type} in {self._first} takes no JSON Lines value"
            )
        return field


def check_fits(schema: pa.Schema, file: InputFile, found: pa.Schema) -> None:
    """Refuse a file whose columns are not those of ``schema``, which a growing output has for good.

    JSON Lines may lack columns; Parquet has all of them. Types may be narrower.

    Raises:
        InputError: names the file and the column.
    """
    is_parquet = file.format == "parquet"
    for name in [*found.names, *(schema.names if is_parquet else ())]:
        if name not in schema.names or name not in found.names:
            there, why = ("", "has no column") if name in schema.names else (" not", "has the column")
            raise InputError(
                f"{file.uri}: it {why} {name!r}, which is{there} in the output's schema; {_ANEW}"
            )
        held = schema.field(name)
        if not _takes(held, found.field(name), is_parquet):
            raise InputError(
                f"{file.uri}: the column {name!r} is {found.field(name).type}, "
                f"the output's is {held.type}; {_ANEW}"
            )


_ANEW = "an output that grows keeps its schema: choose another output.path, or --overwrite"


def _takes(held: pa.Field, found: pa.Field, is_parquet: bool) -> bool:
    if not is_parquet:
        return unify(from_field(held), from_field(found)) == from_field(held)
    try:
        return bool(SchemaBuilder()._widen(held.name, _plain(held), _plain(found), "").type == held.type)
    except InputError:
        return False


def _is_integer(field: pa.Field) -> bool:
    return bool(pa.types.is_integer(field.type))


def _plain(field: pa.Field) -> pa.Field:
    """The field without metadata, and nullable: a row that cannot be read leaves a null."""
    return pa.field(field.name, field.type, nullable=True)


def check_columns(schema: pa.Schema, names: Iterable[str], where: str) -> None:
    """Refuse ``names`` that are no columns of the input. An input without columns has no rows to fail.

    Raises:
        SpecError: names the setting ``where``, the missing column and the nearest ones there are.
    """
    for name in names:
        if len(schema) and name not in schema.names:
            raise SpecError(f"{where}: the input has no column {name!r}{_hint(name, schema.names)}")


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    more = f" and {len(known) - 20} more" if len(known) > 20 else ""
    return f" (it has: {', '.join(known[:20])}{more})"
