"""JSON Lines, plain or compressed: rows are lines, units are byte ranges of the decompressed text."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pyarrow as pa

from b2batch.errors import DriftError, RowError, RowFailure, RowFault, Stage
from b2batch.inputs.files import FoundFile, InputFile, named_faults
from b2batch.inputs.kinds import NULL, Kind, Misfit, fit, from_field, kind_of, to_field, unify
from b2batch.inputs.lines import Line, split_lines
from b2batch.inputs.reader import WHOLE, FilePart, FileScan
from b2batch.inputs.streams import HashedFile, TextStream
from b2batch.inputs.strict_json import parse_record, shown
from b2batch.inputs.unit import UnitCutter, UnitRows, null_rows
from b2batch.rows import PromptRow, WorkUnit
from b2batch.spec import InputSpec


def scan(file: FoundFile, spec: InputSpec, answer_tokens: int, part: FilePart = WHOLE) -> FileScan:
    """Find rows, units, column types and fingerprint in one pass; InputError when it does not decompress."""
    cutter = UnitCutter(spec.rows_per_unit, answer_tokens, first_row=part.first_row, num_blank=part.num_blank)
    kinds: dict[str, Kind] = {}
    with named_faults(file), closing(_open_to_scan(file, spec, part)) as stream:
        num_bytes = file.size - part.start if part.is_bounded else None
        for line in split_lines(stream.read, part.start, num_bytes, spec.max_record_bytes):
            if line.is_blank:
                cutter.add_blank()
                continue
            is_inferred = cutter.num_rows < spec.infer_rows
            record = _record(line, spec) if is_inferred or part.is_new else {}
            if part.is_new is not None and not part.is_new(record.get(str(spec.key))):
                cutter.add_known()
                continue
            if is_inferred:
                for name, value in record.items():
                    kinds[name] = unify(kinds.get(name, NULL), kind_of(value))
            cutter.add_row(line.start, line.stop)
        fingerprint = stream.fingerprint()
    schema = pa.schema([to_field(name, kind) for name, kind in kinds.items()])
    return FileScan(cutter.num_rows, cutter.num_blank, fingerprint, schema, cutter.spans(), cutter.num_known)


def _open_to_scan(file: FoundFile, spec: InputSpec, part: FilePart) -> TextStream:
    if spec.fingerprint == "full":
        return TextStream(file, lambda: HashedFile(file, part.start, part.hashed, part.is_bounded))
    stream = TextStream(file)
    stream.move_to(part.start)
    return stream


def _record(line: Line, spec: InputSpec) -> dict[str, Any]:
    """The values of a line; none where it is no record, which the row says itself when it is read."""
    if line.content is None:
        return {}
    try:
        return parse_record(line.content, spec.encoding)
    except RowError:
        return {}


def whole_lines(file: FoundFile, spec: InputSpec) -> int:
    """The size of an uncompressed file without a last line that somebody is still writing.

    A last line without an end counts where it is a whole record, as many files end without one.
    """
    filesystem, path = file.locate()
    with named_faults(file), filesystem.open_input_file(path) as stored:
        start = max(0, file.size - spec.max_record_bytes)
        stored.seek(start)
        end = bytes(stored.read(file.size - start))
    before, newline, last = end.rpartition(b"\n")
    if not last.strip() or (start and not newline):
        return file.size
    try:
        parse_record(last.removeprefix(b"\xef\xbb\xbf"), spec.encoding)
    except RowError:
        return start + len(before) + len(newline)
    return file.size


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
