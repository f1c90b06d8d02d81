"""A unit of rows: how a file is cut into units, and the rows of one as a worker gets them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from b2batch.rows import PromptRow

# A unit is about a minute's work of a 7B model on one GPU at most: what a crash may cost. A row weighs its
# bytes and TOKEN_WEIGHT for each token it may be answered with, since generating a token costs about as much
# as reading four, which take four bytes each. Of the spec and the rows alone, so that a plan stays the same.
UNIT_WEIGHT = 2 << 20
TOKEN_WEIGHT = 16
SPAN_FIELDS = ("first_row", "num_rows", "start", "stop", "num_blank_before")


@dataclass(frozen=True, slots=True)
class UnitRows:
    """The rows of one unit, twice: as values to render prompts from, as columns to carry.

    ``columns`` has the plan's schema and one row for each of ``rows``, all null where it failed.
    """

    rows: tuple[PromptRow, ...]
    columns: pa.Table


class UnitCutter:
    """Groups the lines of a file, given in order, into units of bounded rows and weight.

    A line heavier than ``UNIT_WEIGHT`` is a unit of its own. A unit's range ends with its last row:
    blank lines between two units belong to neither. ``first_row`` and ``num_blank`` are what stands in the
    file before the first of the lines.
    """

    def __init__(
        self,
        rows_per_unit: int,
        answer_tokens: int = 0,
        unit_weight: int = UNIT_WEIGHT,
        *,
        first_row: int = 0,
        num_blank: int = 0,
    ) -> None:
        self._rows_per_unit = rows_per_unit
        self._answer_weight = answer_tokens * TOKEN_WEIGHT
        self._unit_weight = unit_weight
        self._closed = array("q")
        self._next_row = first_row
        self._first_blank = num_blank
        self._open_rows = 0
        self._start = 0
        self._stop = 0
        self._blank_before = 0
        self.num_rows = 0
        self.num_blank = 0
        self.num_known = 0

    def add_row(self, start: int, stop: int) -> None:
        """The next row, which stands in the byte range ``start:stop``."""
        weight = stop - self._start + self._answer_weight * (self._open_rows + 1)
        if self._open_rows == self._rows_per_unit or weight > self._unit_weight:
            self._close()
        if not self._open_rows:
            self._start, self._blank_before = start, self._first_blank + self.num_blank
        self._stop = stop
        self._open_rows += 1
        self._next_row += 1
        self.num_rows += 1

    def add_known(self) -> None:
        """The next row is one that the output holds: no unit may have it between its rows."""
        self._close()
        self._next_row += 1
        self.num_known += 1

    def add_blank(self) -> None:
        """The next line is blank, and no row."""
        self.num_blank += 1

    def spans(self) -> np.ndarray:
        """All units, as ``FileScan.spans``; nothing may be added any more."""
        self._close()
        return np.frombuffer(self._closed, dtype=np.int64).reshape(-1, len(SPAN_FIELDS))

    def _close(self) -> None:
        if self._open_rows:
            first_row = self._next_row - self._open_rows
            self._closed.extend((first_row, self._open_rows, self._start, self._stop, self._blank_before))
            self._open_rows = 0


def null_rows(schema: pa.Schema, num_rows: int) -> pa.Table:
    """A table of ``num_rows`` rows that are all null; the count holds also where there is no column."""
    if not len(schema):
        return pa.table({"": pa.nulls(num_rows)}).select([])
    return pa.table([pa.nulls(num_rows, field.type) for field in schema], schema=schema)
