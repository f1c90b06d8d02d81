"""What every input format offers: one streaming look at a file, then rows of it by unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from b2batch.inputs.files import FoundFile, InputFile
from b2batch.inputs.unit import UnitRows
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec


@dataclass(frozen=True, slots=True)
class FileScan:
    """What one pass over a file found.

    ``spans`` is an int64 array with a row (num_rows, start, stop, num_blank_before) for each unit.
    ``schema`` may hold fields of null type, for which the file has no value to tell the type by.
    """

    num_rows: int
    num_blank: int
    fingerprint: str
    schema: pa.Schema
    spans: np.ndarray


class OpenRows(Protocol):
    """An open input file; units that follow each other in the file are read in one forward pass."""

    def read(self, unit: WorkUnit) -> UnitRows:
        """The unit's rows; InputError or DriftError where the file does not hold them."""

    def close(self) -> None:
        """Give the file back; may be called again."""


class Format(Protocol):
    """A module that reads one format."""

    def scan(self, file: FoundFile, spec: InputSpec, answer_tokens: int) -> FileScan:
        """One streaming pass in bounded memory; InputError when the file is corrupt.

        ``answer_tokens`` is how many tokens a row may be answered with: units are cut by it.
        """

    def open_rows(self, file: InputFile, schema: pa.Schema, spec: InputSpec) -> OpenRows:
        """Open a planned file, to read its units as columns of ``schema``."""
