"""What a part says about itself, in the key-value metadata of its Parquet footer.

Resume and finalise trust this, not the name alone: a part is a unit's part when its footer says so. A part
that ``compact`` merged holds the footers of all units in it, in the order of their rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from b2batch.errors import IntegrityError, StorageError
from b2batch.outputs.store import Store, storage_error
from b2batch.rows import UnitCounts, WorkUnit

FOOTER_KEY = b"b2batch"


@dataclass(frozen=True, slots=True)
class PartFooter:
    """Who made a part, out of which rows, and what it holds.

    ``file`` fingerprints the input file (path, size, etag, sha256); ``rows_digest`` is the xxh128 over
    the row hashes in order, as hex: the rows' identity without a column in the user's table.
    """

    run_id: str
    unit_index: int
    file_index: int
    first_row: int
    num_rows: int
    file: Mapping[str, Any]
    rows_digest: str
    counts: UnitCounts
    epoch: int
    attempt: int
    worker_id: str
    provenance: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The footer as UTF-8 JSON."""
        text = json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)
        return text.encode("utf-8", "backslashreplace")

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read it back; ValueError when it is not what ``to_bytes`` writes."""
        return cls.from_fields(json.loads(data))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Read it back from plain values; ValueError when they are not a footer's."""
        try:
            return cls(**{**fields, "counts": UnitCounts(**fields["counts"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"unexpected footer fields: {error}") from error


def encode_footers(footers: Sequence[PartFooter]) -> bytes:
    """What stands in a merged part: the footers, with equal files and provenances written once."""
    shared: dict[str, list[Any]] = {"file": [], "provenance": []}
    units = []
    for footer in footers:
        fields = asdict(footer)
        units.append(fields | {name: _index_of(fields[name], values) for name, values in shared.items()})
    text = json.dumps({"shared": shared, "units": units}, ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "backslashreplace")


def _index_of(value: Any, values: list[Any]) -> int:
    if value not in values:
        values.append(value)
    return values.index(value)


def _decode_footers(data: bytes) -> tuple[PartFooter, ...]:
    """ValueError when it is neither a unit's footer nor what ``encode_footers`` writes."""
    document = json.loads(data)
    if "units" not in document:
        return (PartFooter.from_fields(document),)
    try:
        shared = document["shared"].items()
        return tuple(
            PartFooter.from_fields(fields | {name: values[fields[name]] for name, values in shared})
            for fields in document["units"]
        )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"unexpected footer fields: {error}") from error


def digest_rows(row_hashes: Iterable[bytes]) -> str:
    """The ``rows_digest`` of rows with these hashes, in this order."""
    digest = xxhash.xxh128()
    for row_hash in row_hashes:
        digest.update(row_hash)
    return digest.hexdigest()


def read_footer(source: bytes | BinaryIO, name: str = "part") -> PartFooter:
    """The footer of a part of one unit; ``read_footers`` says the rest."""
    footers = read_footers(source, name)
    if len(footers) != 1:
        raise IntegrityError(f"{name} holds {len(footers)} units, one is planned")
    return footers[0]


def read_footers(source: bytes | BinaryIO, name: str = "part") -> tuple[PartFooter, ...]:
    """The footer of each unit in a part, given as its bytes or as a file open for random access.

    Raises:
        IntegrityError: it is not Parquet, was not written by b2batch, or has another number of rows
            than its footer says. ``name`` is used in the message.
        StorageError: it could not be read.
    """
    try:
        metadata = pq.read_metadata(pa.BufferReader(source) if isinstance(source, bytes) else source)
        footers = _decode_footers((metadata.metadata or {})[FOOTER_KEY])
    except KeyError:
        raise IntegrityError(f"{name} was not written by b2batch: its footer says nothing of it") from None
    except StorageError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        if isinstance(error, OSError) and error.errno is not None:  # a disk's words, not pyarrow's
            raise storage_error(name, error) from error
        raise IntegrityError(f"{name} is damaged: {error}") from error
    num_rows = sum(footer.num_rows for footer in footers)
    if metadata.num_rows != num_rows:
        raise IntegrityError(f"{name} has {metadata.num_rows} rows, its footer says {num_rows}")
    return footers


def read_part_footer(store: Store, key: str) -> PartFooter:
    """``read_footer`` of a stored part, without reading the rest of it."""
    with store.open(key) as file:
        return read_footer(file, key)


def read_part_footers(store: Store, key: str) -> tuple[PartFooter, ...]:
    """``read_footers`` of a stored part, without reading the rest of it."""
    with store.open(key) as file:
        return read_footers(file, key)


def check_footer(footer: PartFooter, run_id: str, unit: WorkUnit | None, name: str) -> None:
    """Raise IntegrityError unless ``footer`` is that of ``unit`` (None: no planned one) in run ``run_id``."""
    if unit is None:
        raise IntegrityError(f"{name} holds unit {footer.unit_index}, which is not in the plan of this run")
    found = (footer.run_id, footer.unit_index, footer.file_index, footer.first_row, footer.num_rows)
    planned = (run_id, unit.index, unit.file_index, unit.first_row, unit.num_rows)
    fields = ("run", "unit", "input file", "first row", "number of rows")
    for field, is_, should in zip(fields, found, planned, strict=True):
        if is_ != should:
            raise IntegrityError(f"{name} does not belong to its unit: {field} is {is_}, planned is {should}")
    if footer.counts.num_rows != footer.num_rows:
        raise IntegrityError(f"{name} accounts for {footer.counts.num_rows} of {footer.num_rows} rows")
