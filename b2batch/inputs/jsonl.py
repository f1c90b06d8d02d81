"""JSON Lines, plain or compressed: rows are lines, units are byte ranges of the decompressed text."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pyarrow as pa

from b2batch.errors import DriftError, RowError, RowFailure, RowFault, Stage
from b2batch.inputs.files import FoundFile, InputFile, named_faults
from b2batch.inputs.kinds import NULL, Kind, Misfit, fit, from_field, kind_of, to_field, unify
from b2batch.inputs.lines import Line, split_lines
from b2batch.inputs.reader import FileScan
from b2batch.inputs.streams import TextStream
from b2batch.inputs.strict_json import parse_record, shown
from b2batch.inputs.unit import UnitCutter, UnitRows, null_rows
from b2batch.rows import PromptRow, WorkUnit
from b2batch.spec import InputSpec


def scan(file: FoundFile, spec: InputSpec, answer_tokens: int) -> FileScan:
    """Find rows, units, column types and fingerprint in one pass; InputError when it does not decompress."""
    cutter = UnitCutter(spec.rows_per_unit, answer_tokens)
    kinds: dict[str, Kind] = {}
    with named_faults(file), closing(TextStream(file, hashed=spec.fingerprint == "full")) as stream:
        for line in split_lines(stream.read, 0, None, spec.max_record_bytes):
            if line.is_blank:
                cutter.add_blank()
                continue
            if cutter.num_rows < spec.infer_rows:
                _infer(line, kinds, spec)
            cutter.add_row(line.start, line.stop)
        fingerprint = stream.fingerprint()
    schema = pa.schema([to_field(name, kind) for name, kind in kinds.items()])
    return FileScan(cutter.num_rows, cutter.num_blank, fingerprint, schema, cutter.spans())


def _infer(line: Line, kinds: dict[str, Kind], spec: InputSpec) -> None:
    if line.content is None:
        return
    try:
        record = parse_record(line.content, spec.encoding)
    except RowError:
        return  # the row says so itself when it is read
    for name, value in record.items():
        kinds[name] = unify(kinds.get(name, NULL), kind_of(value))


def open_rows(file: InputFile, schema: pa.Schema, spec: InputSpec) -> JsonlRows:
    """Open a planned JSON Lines file."""
    return JsonlRows(file, schema, spec)


class JsonlRows:
    """An open JSON Lines file; see ``OpenRows``."""

    def __init__(self, file: InputFile, schema: pa.Schema, spec: InputSpec) -> None:
        self._file = file
        self._schema = schema
        self._spec = spec
        self._kinds = {field.name: from_field(field) for field in schema}
        with named_faults(file):
            self._stream = TextStream(file)

    def read(self, unit: WorkUnit) -> UnitRows:
        """The rows of ``unit``; a line that is no record is a row with its failure."""
        numbered = enumerate(self._lines(unit), unit.first_row + unit.num_blank_before + 1)
        lines = [(number, line) for number, line in numbered if not line.is_blank][: unit.num_rows]
        if len(lines) < unit.num_rows:
            raise DriftError(f"{self._file.uri}: the input changed during the run: rows are gone")
        rows, stored = [], []
        for ordinal, (number, line) in enumerate(lines, unit.first_row):
            row, values = self._read_row(line, number, f"{unit.file_index}:{ordinal}")
            rows.append(row)
            stored.append(values)
        return UnitRows(tuple(rows), self._table(stored))

    def _lines(self, unit: WorkUnit) -> list[Line]:
        with named_faults(self._file):
            self._stream.move_to(unit.start)
            size = unit.stop - unit.start
            return list(split_lines(self._stream.read, unit.start, size, self._spec.max_record_bytes))

    def _read_row(self, line: Line, line_number: int, row_id: str) -> tuple[PromptRow, dict[str, Any]]:
        try:
            record = self._parse(line)
            stored = self._fit(record)
        except RowError as error:
            message = f"{self._file.path}, line {line_number}: {error}"
            failure = RowFailure(error.failure.fault, message[:2000], Stage.READ)
            return PromptRow(row_id, line.row_hash, {}, failure), {}
        columns = {name: record.get(name) for name in self._kinds}
        return PromptRow(row_id, line.row_hash, columns), stored

    def _parse(self, line: Line) -> dict[str, Any]:
        if line.content is None:
            limit = f"input.max_record_bytes ({self._spec.max_record_bytes})"
            message = f"{line.stop - line.start} bytes, more than {limit}"
            raise RowError(RowFault.INPUT_TOO_LARGE, message, Stage.READ)
        return parse_record(line.content, self._spec.encoding)

    def _fit(self, record: dict[str, Any]) -> dict[str, Any]:
        hint = f"; the columns' types come from the first input.infer_rows ({self._spec.infer_rows}) rows"
        try:
            for name in record:
                if name not in self._kinds:
                    raise Misfit(f"{shown(name)}: expected no such column, found a value")
            return {name: fit(value, self._kinds[name], shown(name)) for name, value in record.items()}
        except Misfit as misfit:
            raise RowError(RowFault.INPUT_SCHEMA, f"column {misfit}{hint}", Stage.READ) from None

    def _table(self, stored: list[dict[str, Any]]) -> pa.Table:
        if not len(self._schema):
            return null_rows(self._schema, len(stored))
        return pa.Table.from_pylist(stored, schema=self._schema)

    def close(self) -> None:
        """Give the file back; may be called again."""
        self._stream.close()
