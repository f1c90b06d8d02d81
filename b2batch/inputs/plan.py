"""The plan: which files, which units, which columns. The same content gives the same plan everywhere."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import InputError, IntegrityError
from b2batch.inputs import READERS
from b2batch.inputs.files import FoundFile, InputFile, recognise
from b2batch.inputs.listing import list_files
from b2batch.inputs.reader import WHOLE, FilePart, FileScan
from b2batch.inputs.schema import SchemaBuilder
from b2batch.inputs.unit import SPAN_FIELDS
from b2batch.inputs.unreadable import UNREADABLE, scan_unreadable
from b2batch.inputs.version import stored_version
from b2batch.parquet_bytes import read_parquet
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec
from b2batch.storage import retried

_UNIT_FIELDS = ("file_index", *SPAN_FIELDS)
_NUM_ROWS = SPAN_FIELDS.index("num_rows")
_INDEX_FIELD = "unit_index"
_META_FILES, _META_SCHEMA, _META_DIGEST = b"b2batch.files", b"b2batch.schema", b"b2batch.digest"
_META_END = b"b2batch.end"


class Units(Sequence[WorkUnit]):
    """The units of a plan in order, held as one int64 array: a million of them take 48 MB.

    They are numbered from 0 without a gap, but for a plan from which some were taken out: ``indexes`` are
    then those that are left, and ``end`` the first number that none ever had.
    """

    def __init__(self, fields: np.ndarray, indexes: np.ndarray | None = None, end: int = 0) -> None:
        self.fields = fields  # (num_units, len(_UNIT_FIELDS))
        self.indexes = indexes
        self.end = len(fields) if indexes is None else end

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
        number = positions if self.indexes is None else int(self.indexes[positions])
        return WorkUnit(number, *self.fields[positions].tolist())

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
        return sum(file.num_blank for file in self.files if not file.superseded)

    @property
    def num_known(self) -> int:
        """Rows that were left out because the output held their key."""
        return sum(file.num_known for file in self.files if not file.superseded)

    @property
    def generation(self) -> int:
        """The number of the newest generation of an incremental plan, 0 of any other."""
        return max((file.generation for file in self.files), default=0)

    @property
    def ticks(self) -> frozenset[str]:
        """All ticks whose runs planned a file."""
        return frozenset(file.tick for file in self.files if file.tick)

    def first_unit(self, generation: int) -> int:
        """The index of the first unit of ``generation``, or of those after it."""
        first_file = next((file.index for file in self.files if file.generation >= generation), 0)
        position = int(np.searchsorted(self.units.fields[:, 0], first_file))
        return self.units[position].index if position < len(self.units) else self.units.end

    def to_bytes(self) -> bytes:
        """The plan as a Parquet file: the units as its table, files and schema in its metadata."""
        columns = [pa.array(self.units.fields[:, i]) for i in range(len(_UNIT_FIELDS))]
        names = list(_UNIT_FIELDS)
        if self.units.indexes is not None:
            columns.append(pa.array(self.units.indexes))
            names.append(_INDEX_FIELD)
        metadata = {
            _META_FILES: json.dumps([dataclasses.asdict(file) for file in self.files]).encode(),
            _META_SCHEMA: base64.b64encode(self.schema.serialize().to_pybytes()),
            _META_DIGEST: self.digest.encode(),
            _META_END: str(self.units.end).encode(),
        }
        table = pa.table(columns, names=names).replace_schema_metadata(metadata)
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
            table = read_parquet(data)
            metadata = table.schema.metadata
            files = tuple(InputFile(**fields) for fields in json.loads(metadata[_META_FILES]))
            schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(metadata[_META_SCHEMA])))
            columns = [table[name].to_numpy() for name in _UNIT_FIELDS]
            indexes = table[_INDEX_FIELD].to_numpy() if _INDEX_FIELD in table.column_names else None
            end = int(metadata.get(_META_END, b"0"))
            digest = metadata[_META_DIGEST].decode()
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"the stored plan cannot be read: {error}") from error
        units = Units(np.stack(columns, axis=1), indexes, end)
        if digest_plan(files, units, schema) != digest:
            raise IntegrityError("the stored plan is corrupt: its content does not have the digest it names")
        return cls(files, units, schema, digest)


def make_plan(spec: InputSpec, answer_tokens: int = 0, tick: str = "") -> Plan:
    """List, recognise and scan the input files, and cut them into units.

    ``answer_tokens`` is how many tokens a row may be answered with: the more, the smaller the units.
    ``tick`` is what each file is marked with, for templates to see.
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
        scan_it = partial(scan_file, found, len(files), spec, answer_tokens)
        file, scan = retried(scan_it, found.uri)
        builder.add(file, scan.schema)
        spans = limit_spans(scan.spans, left)
        units.append(place_spans(spans, file.index))
        files.append(replace(file, tick=tick))
        left = None if left is None else left - int(spans[:, _NUM_ROWS].sum())
    placed, schema = Units(np.concatenate(units)), builder.schema()
    return Plan(tuple(files), placed, schema, digest_plan(files, placed, schema))


def scan_file(
    found: FoundFile, index: int, spec: InputSpec, answer_tokens: int, part: FilePart = WHOLE
) -> tuple[InputFile, FileScan]:
    """A listed file as one of a plan, and what was found in it.

    Raises:
        InputError: it cannot be read, and ``on_bad_file`` is ``fail``.
    """
    etag = stored_version(found) or ""
    fault = ""
    try:
        name = recognise(found, spec.format)
        scan = READERS[name].scan(found, spec, answer_tokens, part)
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
        start=part.start,
        num_known=scan.num_known,
    )
    return file, scan


def limit_spans(spans: np.ndarray, num_rows: int | None) -> np.ndarray:
    """The units that hold the first ``num_rows`` rows (None: all), the last of them cut short."""
    if num_rows is None:
        return spans
    rows = spans[:, _NUM_ROWS]
    before = np.cumsum(rows) - rows
    kept: np.ndarray = spans[before < num_rows].copy()
    kept[-1:, _NUM_ROWS] = np.minimum(kept[-1:, _NUM_ROWS], num_rows - before[: len(kept)][-1:])
    return kept


def place_spans(spans: np.ndarray, file_index: int) -> np.ndarray:
    """Spans of one file as the fields of units."""
    return np.column_stack([np.full(len(spans), file_index, np.int64), spans])


def digest_plan(files: Sequence[InputFile], units: Units, schema: pa.Schema) -> str:
    """The identity of a plan's content; see ``Plan``."""
    digest = hashlib.sha256(b"b2batch plan 1\n")
    for file in files:
        identity: list[object] = [file.path, file.format, file.fingerprint, file.num_rows, file.num_blank]
        if file.generation or file.tick:
            identity += [file.generation, file.tick, file.start, file.num_known, file.superseded]
        digest.update(json.dumps(identity).encode() + b"\n")
    for field in schema:
        mark = (field.metadata or {}).get(b"b2batch", b"").decode()
        digest.update(json.dumps([field.name, str(field.type), mark]).encode() + b"\n")
    digest.update(units.fields.astype("<i8").tobytes())
    if units.indexes is not None:
        digest.update(units.indexes.astype("<i8").tobytes() + str(units.end).encode())
    return digest.hexdigest()
