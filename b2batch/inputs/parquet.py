"""Parquet: units are slices of a row group; pages are decoded as they are needed, never a whole file."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from b2batch.errors import InputError, RowFailure, RowFault, Stage
from b2batch.inputs.files import FoundFile, InputFile, named_faults
from b2batch.inputs.reader import FileScan
from b2batch.inputs.streams import fast_fingerprint, full_fingerprint
from b2batch.inputs.unit import SPAN_FIELDS, UNIT_BYTES, UnitRows, null_rows
from b2batch.rows import PromptRow, WorkUnit
from b2batch.spec import InputSpec

_BUFFER_BYTES = 1 << 20
_MAX_ROWS_PER_BYTE = 1000
_MIN_ROWS_REFUSED = 1 << 30
# What decoding or converting one bad value raises: Arrow's own, and Python's for text and dates.
_VALUE_FAULTS = (pa.ArrowException, ValueError, OverflowError)


def scan(file: FoundFile, spec: InputSpec) -> FileScan:
    """Read the footer, and for a full fingerprint the bytes; InputError when either is corrupt."""
    with named_faults(file), _open(file) as opened:
        fingerprint = full_fingerprint(file) if spec.fingerprint == "full" else fast_fingerprint(file)
        schema = opened.schema_arrow
        groups = [(group.num_rows, group.total_byte_size) for group in _row_groups(opened)]
        names = schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{file.uri}: the column {twice!r} is there twice")
    num_rows = _checked_num_rows(file, [rows for rows, _ in groups], opened.metadata.num_rows)
    return FileScan(num_rows, 0, fingerprint, schema, _cut(groups, spec.rows_per_unit))


def _open(file: FoundFile) -> pq.ParquetFile:
    filesystem, path = file.locate()
    source = filesystem.open_input_file(path)
    return pq.ParquetFile(
        source, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _row_groups(opened: pq.ParquetFile) -> Iterator[Any]:
    return (opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups))


def _checked_num_rows(file: FoundFile, rows_of_groups: list[int], num_rows: int) -> int:
    if min(rows_of_groups, default=0) < 0 or sum(rows_of_groups) != num_rows:
        raise InputError(
            f"{file.uri}: the footer is corrupt: its row groups do not add up to {num_rows} rows"
        )
    if num_rows > max(_MIN_ROWS_REFUSED, _MAX_ROWS_PER_BYTE * file.size):
        raise InputError(f"{file.uri}: the footer is not believable: {num_rows} rows in {file.size} bytes")
    return num_rows


def _cut(groups: list[tuple[int, int]], rows_per_unit: int) -> np.ndarray:
    """The units of row groups given as (rows, bytes). A unit never crosses from one group into the next."""
    spans, first = [np.empty((0, len(SPAN_FIELDS)), np.int64)], 0
    for num_rows, num_bytes in groups:
        if num_rows:
            step = min(rows_per_unit, max(1, UNIT_BYTES * num_rows // max(1, num_bytes)))
            starts = np.arange(first, first + num_rows, step, dtype=np.int64)
            stops = np.minimum(starts + step, first + num_rows)
            spans.append(np.stack([stops - starts, starts, stops, np.zeros_like(starts)], axis=1))
        first += num_rows
    return np.concatenate(spans)


def open_rows(file: InputFile, schema: pa.Schema, spec: InputSpec) -> ParquetRows:
    """Open a planned Parquet file."""
    return ParquetRows(file, schema)


class ParquetRows:
    """An open Parquet file; see ``OpenRows``. A unit before the last one read decodes its row group anew."""

    def __init__(self, file: InputFile, schema: pa.Schema) -> None:
        self._file = file
        self._schema = schema
        with named_faults(file):
            self._opened = _open(file)
            self._group_stops = list(accumulate(group.num_rows for group in _row_groups(self._opened)))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held: pa.Table | None = None
        self._position = -1  # the ordinal of the first held row; -1: nothing is being decoded

    def read(self, unit: WorkUnit) -> UnitRows:
        """The rows of ``unit``; a row with a value that is no text or does not fit is its own failure."""
        try:
            with named_faults(self._file):
                table = self._take(unit)
        except Exception:
            self._position = -1  # the decoder stands nobody knows where: the next unit begins anew
            raise
        rows, columns = self._convert(table, unit)
        return UnitRows(tuple(rows), columns)

    def _take(self, unit: WorkUnit) -> pa.Table:
        group = bisect_right(self._group_stops, unit.start)
        group_start = self._group_stops[group - 1] if group else 0
        if self._position < group_start or self._position > unit.start:
            self._begin(group, group_start, unit.num_rows)
        while self._position < unit.start:
            self._next_piece(unit.start - self._position)
        stop = unit.start + unit.num_rows
        pieces = []
        while self._position < stop:
            pieces.append(self._next_piece(stop - self._position))
        return pa.concat_tables(pieces)

    def _begin(self, group: int, group_start: int, batch_rows: int) -> None:
        groups = list(range(group, len(self._group_stops)))
        self._batches = self._opened.iter_batches(batch_rows, row_groups=groups, use_threads=False)
        self._held = None
        self._position = group_start

    def _next_piece(self, max_rows: int) -> pa.Table:
        """The next rows that the decoder gives in one piece."""
        held = self._held
        if held is None or not held.num_rows:
            batch = next(self._batches, None)
            if batch is None:
                raise InputError(f"{self._file.uri}: corrupt: it holds fewer rows than its footer says")
            held = pa.Table.from_batches([batch])
        self._held = held.slice(max_rows)
        self._position += min(max_rows, held.num_rows)
        return held.slice(0, max_rows)

    def _convert(self, table: pa.Table, unit: WorkUnit) -> tuple[list[PromptRow], pa.Table]:
        try:
            return self._rows(table, unit, unit.first_row)
        except _VALUE_FAULTS:
            single = [
                self._convert_row(table.slice(i, 1), unit, unit.first_row + i) for i in range(table.num_rows)
            ]
            return [row for rows, _ in single for row in rows], pa.concat_tables(
                [columns for _, columns in single]
            )

    def _convert_row(self, table: pa.Table, unit: WorkUnit, ordinal: int) -> tuple[list[PromptRow], pa.Table]:
        try:
            return self._rows(table, unit, ordinal)
        except _VALUE_FAULTS as error:
            not_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
            fault = RowFault.INPUT_UTF8 if not_text else RowFault.INPUT_SCHEMA
            reason = (str(error).splitlines() or [""])[0]
            failure = RowFailure(
                fault, f"{self._file.path}, row {ordinal} (from 0): {reason}"[:2000], Stage.READ
            )
            place = (
                f"{self._file.path}:{ordinal}".encode()
            )  # no values to hash: the row's place stands for it
            row = PromptRow(f"{unit.file_index}:{ordinal}", xxhash.xxh128_digest(place), {}, failure)
            return [row], null_rows(self._schema, 1)

    def _rows(self, table: pa.Table, unit: WorkUnit, first: int) -> tuple[list[PromptRow], pa.Table]:
        table.validate(full=True)
        columns = pa.table([_cast(table, field) for field in self._schema], schema=self._schema)
        if not len(self._schema):
            columns = null_rows(self._schema, table.num_rows)
        values = _retype(table, _python_type).to_pylist()
        exact = _retype(table, _exact_type)
        hashed = values if exact.schema.equals(table.schema) else exact.to_pylist()
        rows = [
            PromptRow(
                f"{unit.file_index}:{first + i}",
                canonical_hash(exactly),
                {**dict.fromkeys(columns.column_names), **row},
            )
            for i, (row, exactly) in enumerate(zip(values, hashed, strict=True))
        ]
        return rows, columns

    def close(self) -> None:
        """Give the file back; may be called again."""
        self._batches = iter(())
        self._opened.close(force=True)


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


def _cast(table: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    if field.name not in table.column_names:
        return pa.chunked_array([pa.nulls(table.num_rows, field.type)])
    return table.column(field.name).cast(field.type)


def _retype(table: pa.Table, convert: Any) -> pa.Table:
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


def _inside(arrow: pa.DataType, convert: Any) -> pa.DataType:
    if pa.types.is_list(arrow):
        return pa.list_(arrow.value_field.with_type(convert(arrow.value_type)))
    if pa.types.is_large_list(arrow):
        return pa.large_list(arrow.value_field.with_type(convert(arrow.value_type)))
    if pa.types.is_struct(arrow):
        children = [arrow.field(i) for i in range(arrow.num_fields)]
        return pa.struct([child.with_type(convert(child.type)) for child in children])
    return arrow
