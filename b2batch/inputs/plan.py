"""The plan: which files, which units, which columns. The same content gives the same plan everywhere."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import InputError, IntegrityError
from b2batch.inputs import READERS
from b2batch.inputs.files import FoundFile, InputFile, recognise
from b2batch.inputs.listing import list_files
from b2batch.inputs.reader import FileScan
from b2batch.inputs.schema import SchemaBuilder
from b2batch.inputs.unreadable import UNREADABLE, scan_unreadable
from b2batch.inputs.version import stored_version
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec
from b2batch.storage import retried

_UNIT_FIELDS = ("file_index", "first_row", "num_rows", "start", "stop", "num_blank_before")
_META_FILES, _META_SCHEMA, _META_DIGEST = b"b2batch.files", b"b2batch.schema", b"b2batch.digest"


class Units(Sequence[WorkUnit]):
    """The units of a plan in order, held as one int64 array: a million of them take 48 MB."""

    def __init__(self, fields: np.ndarray) -> None:
        self.fields = fields  # (num_units, len(_UNIT_FIELDS))

    def __len__(self) -> int:
        return len(self.fields)

    @overload
    def __getitem__(self, index: int) -> WorkUnit: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[WorkUnit]: ...
    def __getitem__(self, index: int | slice) -> WorkUnit | Sequence[WorkUnit]:
        positions = range(len(self))[index]
        if isinstance(positions, range):
            return [self[position] for position in positions]
        return WorkUnit(positions, *self.fields[positions].tolist())

    def __iter__(self) -> Iterator[WorkUnit]:
        return (self[index] for index in range(len(self)))

    @property
    def num_rows(self) -> int:
        """Rows of all units."""
        return int(self.fields[:, _UNIT_FIELDS.index("num_rows")].sum())


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is to be done, computed before anything runs. Two plans are the same when their digests are.

    ``digest`` identifies the content (fingerprints, units, columns), not where it stands or when it
    was written: it is the input's half of a run's identity.
    """

    files: tuple[InputFile, ...]
    units: Units
    schema: pa.Schema
    digest: str

    @property
    def num_rows(self) -> int:
        """Rows to answer: those of all units."""
        return self.units.num_rows

    @property
    def num_blank(self) -> int:
        """Blank lines of all files, which are no rows."""
        return sum(file.num_blank for file in self.files)

    def to_bytes(self) -> bytes:
        """The plan as a Parquet file: the units as its table, files and schema in its metadata."""
        columns = [pa.array(self.units.fields[:, i]) for i in range(len(_UNIT_FIELDS))]
        metadata = {
            _META_FILES: json.dumps([dataclasses.asdict(file) for file in self.files]).encode(),
            _META_SCHEMA: base64.b64encode(self.schema.serialize().to_pybytes()),
            _META_DIGEST: self.digest.encode(),
        }
        table = pa.table(columns, names=list(_UNIT_FIELDS)).replace_schema_metadata(metadata)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Plan:
        """The plan that ``to_bytes`` wrote.

        Raises:
            IntegrityError: the bytes are no plan, or its content does not have its digest.
        """
        try:
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
            metadata = table.schema.metadata
            files = tuple(InputFile(**fields) for fields in json.loads(metadata[_META_FILES]))
            schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(metadata[_META_SCHEMA])))
            columns = [table[name].to_numpy() for name in _UNIT_FIELDS]
            digest = metadata[_META_DIGEST].decode()
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"the stored plan cannot be read: {error}") from error
        units = Units(np.stack(columns, axis=1))
        if _digest(files, units, schema) != digest:
            raise IntegrityError("the stored plan is corrupt: its content does not have the digest it names")
        return cls(files, units, schema, digest)


def make_plan(spec: InputSpec, answer_tokens: int = 0) -> Plan:
    """List, recognise and scan the input files, and cut them into units.

    ``answer_tokens`` is how many tokens a row may be answered with: the more, the smaller the units.
    With ``spec.limit`` files beyond the last row taken are neither scanned nor part of the plan.

    Raises:
        InputError: a file is missing, of an unknown format or corrupt, or the columns disagree.
        StorageError: an object store failed each time it was asked.
    """
    files: list[InputFile] = []
    units: list[np.ndarray] = [np.empty((0, len(_UNIT_FIELDS)), np.int64)]
    builder = SchemaBuilder()
    left = spec.limit
    for found in list_files(spec):
        if left == 0:
            break
        scan_it = partial(_scan, found, len(files), spec, answer_tokens)
        file, scan = retried(scan_it, found.uri)
        if file.format == "parquet":
            builder.add_arrow(file, scan.schema)
        else:
            builder.add_json(scan.schema)
        spans = limit_spans(scan.spans, left)
        units.append(_place(spans, file.index))
        files.append(file)
        left = None if left is None else left - int(spans[:, 0].sum())
    placed, schema = Units(np.concatenate(units)), builder.schema()
    return Plan(tuple(files), placed, schema, _digest(files, placed, schema))


def _scan(found: FoundFile, index: int, spec: InputSpec, answer_tokens: int) -> tuple[InputFile, FileScan]:
    etag = stored_version(found) or ""
    fault = ""
    try:
        name = recognise(found, spec.format)
        scan = READERS[name].scan(found, spec, answer_tokens)
    except InputError as error:
        if spec.on_bad_file == "fail":
            raise InputError(f"{error}; input.on_bad_file: skip makes such a file one error row") from error
        name, scan, fault = UNREADABLE, scan_unreadable(found), str(error)
    file = InputFile(
        found.root,
        found.path,
        found.size,
        found.modified,
        etag=etag,
        index=index,
        format=name,
        num_rows=scan.num_rows,
        num_blank=scan.num_blank,
        fingerprint=scan.fingerprint,
        fault=fault,
    )
    return file, scan


def limit_spans(spans: np.ndarray, num_rows: int | None) -> np.ndarray:
    """The units that hold the first ``num_rows`` rows (None: all), the last of them cut short."""
    if num_rows is None:
        return spans
    before = np.cumsum(spans[:, 0]) - spans[:, 0]
    kept: np.ndarray = spans[before < num_rows].copy()
    kept[-1:, 0] = np.minimum(kept[-1:, 0], num_rows - before[: len(kept)][-1:])
    return kept


def _place(spans: np.ndarray, file_index: int) -> np.ndarray:
    """Spans of one file as rows of ``_UNIT_FIELDS``."""
    first_rows = np.cumsum(spans[:, 0]) - spans[:, 0]
    indexes = np.full(len(spans), file_index, np.int64)
    return np.column_stack([indexes, first_rows, spans])


def _digest(files: Sequence[InputFile], units: Units, schema: pa.Schema) -> str:
    digest = hashlib.sha256(b"b2batch plan 1\n")
    for file in files:
        identity = [file.path, file.format, file.fingerprint, file.num_rows, file.num_blank]
        digest.update(json.dumps(identity).encode() + b"\n")
    for field in schema:
        mark = (field.metadata or {}).get(b"b2batch", b"").decode()
        digest.update(json.dumps([field.name, str(field.type), mark]).encode() + b"\n")
    digest.update(units.fields.astype("<i8").tobytes())
    return digest.hexdigest()
