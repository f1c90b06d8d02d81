"""What every input format offers: one streaming look at a file, then rows of it by unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from b2batch.inputs.files import FoundFile, InputFile
from b2batch.inputs.unit import UnitRows
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec


@dataclass(frozen=True, slots=True)
class FilePart:
    """Which rows of a file are to be planned: those from the byte ``start`` on, of these the new ones.

    ``first_row`` and ``num_blank`` count the rows and blank lines before; ``hashed`` is the sha256 object
    of the bytes before, which the fingerprint of the whole goes on with. ``is_new`` decides by the value of
    ``input.key``. ``is_bounded``: the file may be growing, and what lies beyond its listed size is not read.
    """

    start: int = 0
    first_row: int = 0
    num_blank: int = 0
    hashed: Any = None
    is_new: Callable[[Any], bool] | None = None
    is_bounded: bool = False


WHOLE = FilePart()


@dataclass(frozen=True, slots=True)
class FileScan:
    """What one pass over a file found.

    ``spans`` is an int64 array with a row of ``SPAN_FIELDS`` for each unit. ``num_known`` rows were left
    out as not new. ``schema`` may hold fields of null type, for which the file has no value to tell the
    type by.
    """

    num_rows: int
    num_blank: int
    fingerprint: str
    schema: pa.Schema
    spans: np.ndarray
    num_known: int = 0


class OpenRows(Protocol):
    """An open input file; units that follow each other in the file are read in one forward pass."""

    def read(self, unit: WorkUnit) -> UnitRows:
        """The unit's rows; InputError or DriftError where the file does not hold them."""

    def close(self) -> None:
        """Give the file back; may be called again."""


class Format(Protocol):
    """A module that reads one format."""

    def scan(self, file: FoundFile, spec: InputSpec, answer_tokens: int, part: FilePart) -> FileScan:
        """One streaming pass in bounded memory; InputError when the file is corrupt.

        ``answer_tokens`` is how many tokens a row may be answered with: units are cut by it.
        """

    def open_rows(self, file: InputFile, schema: pa.Schema, spec: InputSpec) -> OpenRows:
        """Open a planned file, to read its units as columns of ``schema``."""
