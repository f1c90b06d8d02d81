"""From a work unit to its rows: what a worker reads with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import pyarrow as pa

from b2batch.errors import InputError
from b2batch.inputs import READERS
from b2batch.inputs.files import InputFile
from b2batch.inputs.reader import OpenRows
from b2batch.inputs.unit import UnitRows
from b2batch.inputs.unreadable import file_errors
from b2batch.inputs.version import check_unchanged
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec
from b2batch.storage import retried


class UnitReader:
    """Reads units of a plan, and keeps the last file open.

    So units in the plan's order decompress and decode each file once; in any other order they are
    as right, and slower. ``files`` and ``schema`` are the plan's, without its units, so that they
    are small to send.
    """

    def __init__(self, files: Sequence[InputFile], schema: pa.Schema, spec: InputSpec) -> None:
        self._files = files
        self._schema = schema
        self._spec = spec
        self._open: tuple[int, OpenRows] | None = None
        self._versions: dict[int, str] = {}  # file index → a version that holds what was planned

    def read(self, unit: WorkUnit) -> UnitRows:
        """The rows of ``unit``.

        Raises:
            DriftError: the file is not the one that was planned.
            InputError: the file is corrupt where the scan did not look, and ``on_bad_file`` is ``fail``.
            StorageError: the object store failed each time it was asked.
        """
        file = self._files[unit.file_index]
        if file.fault:
            return file_errors(file, self._schema, unit, file.fault)
        found = retried(lambda: self._read(file, unit), file.uri)
        if not file.tick:
            return found
        return replace(found, rows=tuple(replace(row, tick=file.tick) for row in found.rows))

    def _read(self, file: InputFile, unit: WorkUnit) -> UnitRows:
        self._look_at(file)
        try:
            rows = self._rows_of(file).read(unit)
        except InputError as error:
            self.close()
            if self._spec.on_bad_file == "fail":
                raise
            return file_errors(file, self._schema, unit, error)
        except Exception:
            self.close()  # the stream stands nobody knows where: the next attempt begins anew
            raise
        self._look_at(file)  # again: it may have been written while it was read
        return rows

    def _look_at(self, file: InputFile) -> None:
        self._versions[file.index] = check_unchanged(file, self._versions.get(file.index, file.etag))

    def _rows_of(self, file: InputFile) -> OpenRows:
        if self._open is not None and self._open[0] == file.index:
            return self._open[1]
        self.close()
        rows = READERS[file.format].open_rows(file, self._schema, self._spec)
        self._open = (file.index, rows)
        return rows

    def close(self) -> None:
        """Give the open file back; may be called again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
