"""What a part says about itself, in the key-value metadata of its Parquet footer.

Resume and finalise trust this, not the name alone: a part is a unit's part when its footer says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
        try:
            fields = json.loads(data)
            return cls(counts=UnitCounts(**fields.pop("counts")), **fields)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"unexpected footer fields: {error}") from error


def digest_rows(row_hashes: Iterable[bytes]) -> str:
    """The ``rows_digest`` of rows with these hashes, in this order."""
    digest = xxhash.xxh128()
    for row_hash in row_hashes:
        digest.update(row_hash)
    return digest.hexdigest()


def read_footer(source: bytes | BinaryIO, name: str = "part") -> PartFooter:
    """The footer of a part, given as its bytes or as a file open for random access.

    Raises:
        IntegrityError: it is not Parquet, was not written by b2batch, or has another number of rows
            than its footer says. ``name`` is used in the message.
    """
    try:
        metadata = pq.read_metadata(pa.BufferReader(source) if isinstance(source, bytes) else source)
        footer = PartFooter.from_bytes((metadata.metadata or {})[FOOTER_KEY])
    except KeyError:
        raise IntegrityError(f"{name} was not written by b2batch: its footer says nothing of it") from None
    except StorageError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
        if isinstance(error, OSError) and error.errno is not None:  # a disk's words, not pyarrow's
            raise storage_error(name, error) from error
        raise IntegrityError(f"{name} is damaged: {error}") from error
    if metadata.num_rows != footer.num_rows:
        raise IntegrityError(f"{name} has {metadata.num_rows} rows, its footer says {footer.num_rows}")
    return footer


def read_part_footer(store: Store, key: str) -> PartFooter:
    """``read_footer`` of a stored part, without reading the rest of it."""
    with store.open(key) as file:
        return read_footer(file, key)


def check_footer(footer: PartFooter, run_id: str, unit: WorkUnit, name: str) -> None:
    """Raise IntegrityError unless ``footer`` is that of ``unit`` in run ``run_id``."""
    found = (footer.run_id, footer.unit_index, footer.file_index, footer.first_row, footer.num_rows)
    planned = (run_id, unit.index, unit.file_index, unit.first_row, unit.num_rows)
    fields = ("run", "unit", "input file", "first row", "number of rows")
    for field, is_, should in zip(fields, found, planned, strict=True):
        if is_ != should:
            raise IntegrityError(f"{name} does not belong to its unit: {field} is {is_}, planned is {should}")
    if footer.counts.num_rows != footer.num_rows:
        raise IntegrityError(f"{name} accounts for {footer.counts.num_rows} of {footer.num_rows} rows")
