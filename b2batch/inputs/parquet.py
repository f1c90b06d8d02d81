"""Parquet: units are slices of a row group; pages are decoded as they are needed, never a whole file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import InputError
from b2batch.inputs.arrow_rows import RowConverter
from b2batch.inputs.files import FoundFile, InputFile, named_faults
from b2batch.inputs.reader import WHOLE, FilePart, FileScan
from b2batch.inputs.streams import fast_fingerprint, full_fingerprint
from b2batch.inputs.unit import SPAN_FIELDS, TOKEN_WEIGHT, UNIT_WEIGHT, UnitRows
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec

_BUFFER_BYTES = 1 << 20
_MAX_ROWS_PER_BYTE = 1000
_MIN_ROWS_REFUSED = 1 << 30


def scan(file: FoundFile, spec: InputSpec, answer_tokens: int, part: FilePart = WHOLE) -> FileScan:
    """Read the footer, and for a full fingerprint the bytes; InputError when either is corrupt."""
    with named_faults(file), _open(file) as opened:
        fingerprint = full_fingerprint(file) if spec.fingerprint == "full" else fast_fingerprint(file)
        schema = opened.schema_arrow
        groups = [(group.num_rows, group.total_byte_size) for group in _row_groups(opened)]
        names = schema.names
        is_known = _is_known(opened, str(spec.key), part.is_new) if part.is_new else None
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{file.uri}: the column {twice!r} is there twice")
    num_rows = _checked_num_rows(file, [rows for rows, _ in groups], opened.metadata.num_rows)
    spans = _cut(groups, spec.rows_per_unit, answer_tokens)
    if is_known is None:
        return FileScan(num_rows, 0, fingerprint, schema, spans)
    num_known = int(is_known.sum())
    return FileScan(num_rows - num_known, 0, fingerprint, schema, _without(spans, is_known), num_known)


def _is_known(opened: pq.ParquetFile, key: str, is_new: Callable[[Any], bool]) -> np.ndarray:
    """Of each row, whether ``is_new`` says that it is not."""
    if key not in opened.schema_arrow.names:
        return np.zeros(opened.metadata.num_rows, bool)  # refused where the columns are checked
    batches = opened.iter_batches(columns=[key], use_threads=False)
    known = [not is_new(value) for batch in batches for value in _values(batch.column(0))]
    return np.array(known, bool)


def _values(column: pa.Array) -> Iterator[Any]:
    """The values; None for one that is no text, whose row says so itself when it is read."""
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError:
            yield None


def _without(spans: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """The spans cut around the rows that are known: what is left of each lies in one piece."""
    pieces = [np.empty((0, len(SPAN_FIELDS)), np.int64)]
    for first, num_rows, *_ in spans.tolist():
        kept = np.flatnonzero(~is_known[first : first + num_rows]) + first
        runs = np.split(kept, np.flatnonzero(np.diff(kept) > 1) + 1)
        pieces += [np.array([[run[0], len(run), run[0], run[-1] + 1, 0]]) for run in runs if len(run)]
    return np.concatenate(pieces)


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


def _cut(groups: list[tuple[int, int]], rows_per_unit: int, answer_tokens: int) -> np.ndarray:
    """The units of row groups given as (rows, bytes). A unit never crosses from one group into the next."""
    spans, first = [np.empty((0, len(SPAN_FIELDS)), np.int64)], 0
    for num_rows, num_bytes in groups:
        if num_rows:
            weight = num_bytes + TOKEN_WEIGHT * answer_tokens * num_rows
            step = min(rows_per_unit, max(1, UNIT_WEIGHT * num_rows // max(1, weight)))
            starts = np.arange(first, first + num_rows, step, dtype=np.int64)
            stops = np.minimum(starts + step, first + num_rows)
            spans.append(np.stack([starts, stops - starts, starts, stops, np.zeros_like(starts)], axis=1))
        first += num_rows
    return np.concatenate(spans)


def open_rows(file: InputFile, schema: pa.Schema, spec: InputSpec) -> ParquetRows:
    """Open a planned Parquet file."""
    return ParquetRows(file, schema)


class ParquetRows:
    """An open Parquet file; see ``OpenRows``. A unit before the last one read decodes its row group anew."""

    def __init__(self, file: InputFile, schema: pa.Schema) -> None:
        self._file = file
        self._converter = RowConverter(file, schema)
        with named_faults(file):
            self._opened = _open(file)
            self._group_stops = list(accumulate(group.num_rows for group in _row_groups(self._opened)))
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held: pa.Table | None = None
        self._position = -1  # the ordinal of the first held row; -1: nothing is being decoded

    def read(self, unit: WorkUnit) -> UnitRows:
        """The rows of ``unit``; a row with a value that is no text or does not fit is its own failure."""
        with named_faults(self._file):
            table = self._take(unit)
        return self._converter.convert(table, unit.first_row)

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

    def close(self) -> None:
        """Give the file back; may be called again."""
        self._batches = iter(())
        self._opened.close(force=True)
