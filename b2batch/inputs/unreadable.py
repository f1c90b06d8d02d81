"""A file that cannot be read, where ``input.on_bad_file: skip`` lets a run go on without it.

Nobody knows how many rows it holds. In the plan it is one row, whose error names the file.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash

from b2batch.errors import B2BatchError, InputError, RowFailure, RowFault, Stage
from b2batch.inputs.files import FoundFile, InputFile
from b2batch.inputs.reader import FileScan
from b2batch.inputs.streams import full_fingerprint
from b2batch.inputs.unit import UnitRows, null_rows
from b2batch.rows import PromptRow, WorkUnit

UNREADABLE = "unreadable"


def scan_unreadable(file: FoundFile) -> FileScan:
    """One row for the file. It is identified by its bytes, where at least these can be had."""
    try:
        fingerprint = full_fingerprint(file)
    except (B2BatchError, OSError):
        fingerprint = UNREADABLE
    return FileScan(1, 0, fingerprint, pa.schema([]), np.array([[0, 1, 0, file.size, 0]], np.int64))


def file_errors(file: InputFile, schema: pa.Schema, unit: WorkUnit, error: InputError | str) -> UnitRows:
    """The rows of ``unit``, all failed by what is wrong with their file."""
    failure = RowFailure(RowFault.FILE, str(error)[:2000], Stage.READ)
    rows = [
        PromptRow(f"{file.index}:{ordinal}", _row_hash(file, ordinal), {}, failure)
        for ordinal in range(unit.first_row, unit.first_row + unit.num_rows)
    ]
    return UnitRows(tuple(rows), null_rows(schema, unit.num_rows))


def _row_hash(file: InputFile, ordinal: int) -> bytes:
    return xxhash.xxh128_digest(f"{file.path}:{ordinal}:{file.fingerprint}".encode())
