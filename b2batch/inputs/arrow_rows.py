"""Arrow tables into rows: values as Python has them, an exact hash, columns of the plan's types."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import xxhash

from b2batch.errors import RowFailure, RowFault, Stage
from b2batch.inputs.files import InputFile
from b2batch.inputs.unit import UnitRows, null_rows
from b2batch.rows import PromptRow

# What decoding or converting one bad value raises: Arrow's own, and Python's for text and dates.
_VALUE_FAULTS = (pa.ArrowException, ValueError, OverflowError)


class RowConverter:
    """Turns what a file holds into rows of ``schema``; one bad value costs its own row only."""

    def __init__(self, file: InputFile, schema: pa.Schema) -> None:
        self._file = file
        self._schema = schema

    def convert(self, table: pa.Table, first_row: int) -> UnitRows:
        """The rows of ``table``, the first of which has the ordinal ``first_row`` in its file."""
        try:
            return self._convert_all(table, first_row)
        except _VALUE_FAULTS:
            parts = [self._convert_one(table.slice(i, 1), first_row + i) for i in range(table.num_rows)]
        rows = tuple(row for part in parts for row in part.rows)
        return UnitRows(rows, pa.concat_tables([part.columns for part in parts]))

    def _convert_one(self, table: pa.Table, ordinal: int) -> UnitRows:
        try:
            return self._convert_all(table, ordinal)
        except _VALUE_FAULTS as error:
            return UnitRows((self._failed_row(error, ordinal),), null_rows(self._schema, 1))

    def _failed_row(self, error: Exception, ordinal: int) -> PromptRow:
        """A row without values; its place stands for them in its hash."""
        not_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
        fault = RowFault.INPUT_UTF8 if not_text else RowFault.INPUT_SCHEMA
        reason = (str(error).splitlines() or [""])[0]
        message = f"{self._file.path}, row {ordinal} (from 0): {reason}"
        row_hash = xxhash.xxh128_digest(f"{self._file.path}:{ordinal}".encode())
        failure = RowFailure(fault, message[:2000], Stage.READ)
        return PromptRow(self._row_id(ordinal), row_hash, {}, failure)

    def _convert_all(self, table: pa.Table, first_row: int) -> UnitRows:
        table.validate(full=True)  # offsets and dictionary indexes of a corrupt file may point anywhere
        columns = self._fit(table)
        values = _retype(table, _python_type).to_pylist()
        exact = _retype(table, _exact_type)
        hashed = values if exact.schema.equals(table.schema) else exact.to_pylist()
        absent = dict.fromkeys(self._schema.names)
        rows = [
            PromptRow(self._row_id(ordinal), canonical_hash(exactly), {**absent, **row})
            for ordinal, (row, exactly) in enumerate(zip(values, hashed, strict=True), first_row)
        ]
        return UnitRows(tuple(rows), columns)

    def _row_id(self, ordinal: int) -> str:
        return f"{self._file.index}:{ordinal}"

    def _fit(self, table: pa.Table) -> pa.Table:
        if not len(self._schema):
            return null_rows(self._schema, table.num_rows)
        return pa.table([_cast(table, field) for field in self._schema], schema=self._schema)


def canonical_hash(row: dict[str, Any]) -> bytes:
    """xxh128 of a Parquet row in its canonical form, which no encoding, compression or column order changes.

    The form is compact JSON in UTF-8 with sorted keys. Dates and times stand as the integer of their
    Arrow type, binary as hex after ``0x``, decimals and other types as their text; a float as the
    shortest text that reads back as the same float.
    """
    text = json.dumps(row, ensure_ascii=False, separators=(",", ":"), sort_keys=True, default=_canonical)
    return xxhash.xxh128_digest(text.encode("utf-8"))


def _canonical(value: Any) -> str:
    return f"0x{value.hex()}" if isinstance(value, bytes) else str(value)


_Retyping = Callable[[pa.DataType], pa.DataType]


def _cast(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    return table.column(field.name).cast(field.type)


def _retype(table: pa.Table, convert: _Retyping) -> pa.Table:
    fields = [pa.field(field.name, convert(field.type)) for field in table.schema]
    columns = [
        column if column.type == field.type else column.cast(field.type, safe=False)
        for column, field in zip(table.columns, fields, strict=True)
    ]
    return pa.table(columns, schema=pa.schema(fields)) if columns else table


def _python_type(arrow: pa.DataType) -> pa.DataType:
    """Times in nanoseconds as microseconds, the finest that Python's own types have."""
    if pa.types.is_timestamp(arrow) and arrow.unit == "ns":
        return pa.timestamp("us", arrow.tz)
    if pa.types.is_time64(arrow) and arrow.unit == "ns":
        return pa.time64("us")
    if pa.types.is_duration(arrow) and arrow.unit == "ns":
        return pa.duration("us")
    return _inside(arrow, _python_type)


def _exact_type(arrow: pa.DataType) -> pa.DataType:
    """Dates and times as the integers that they are stored as."""
    if pa.types.is_date32(arrow) or pa.types.is_time32(arrow):
        return pa.int32()
    if pa.types.is_temporal(arrow) and not pa.types.is_interval(arrow):
        return pa.int64()
    return _inside(arrow, _exact_type)


def _inside(arrow: pa.DataType, convert: _Retyping) -> pa.DataType:
    if pa.types.is_list(arrow):
        return pa.list_(arrow.value_field.with_type(convert(arrow.value_type)))
    if pa.types.is_large_list(arrow):
        return pa.large_list(arrow.value_field.with_type(convert(arrow.value_type)))
    if pa.types.is_struct(arrow):
        children = [arrow.field(i) for i in range(arrow.num_fields)]
        return pa.struct([child.with_type(convert(child.type)) for child in children])
    return arrow
