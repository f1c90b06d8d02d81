"""The keys of the rows that a growing output holds, so that each key is labelled once."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import IntegrityError
from b2batch.parquet_bytes import read_parquet

_DIGEST_BYTES = 16
_SCHEMA = pa.schema({"file_index": pa.int32(), "key": pa.binary(_DIGEST_BYTES)})


class KeyBook:
    """Tells new keys from those that are held, or came before in the same run: the first row has it.

    A key is kept as its hash, in some 100 bytes of memory. Values of different types differ; a row without
    a key (null, absent, unreadable) is always new.
    """

    def __init__(self, held: Iterable[bytes] = ()) -> None:
        self._held = set(held)
        self._new: list[tuple[int, bytes]] = []

    def open_file(self, file_index: int) -> FileKeys:
        """What decides over the rows of one file; nothing is kept of it until ``keep``."""
        return FileKeys(self._held, file_index)

    def keep(self, keys: FileKeys) -> None:
        """The file was scanned to its end: its keys are held from now on."""
        self._held |= keys.new
        self._new += [(keys.file_index, key) for key in sorted(keys.new)]

    def to_bytes(self) -> bytes:
        """The new keys as a Parquet file; the same keys give the same bytes."""
        columns = [[index for index, _ in self._new], [key for _, key in self._new]]
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        return sink.getvalue()


class FileKeys:
    """The keys of one file while it is scanned."""

    def __init__(self, held: set[bytes], file_index: int) -> None:
        self._held = held
        self.file_index = file_index
        self.new: set[bytes] = set()

    def is_new(self, value: Any) -> bool:
        """Whether no row before had this key."""
        if value is None:
            return True
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).digest()
        if digest in self._held or digest in self.new:
            return False
        self.new.add(digest)
        return True


def read_keys(data: bytes, left_out: frozenset[int]) -> Iterator[bytes]:
    """The keys that ``KeyBook.to_bytes`` wrote, but for those of the files ``left_out``.

    Raises:
        IntegrityError: the bytes are damaged.
    """
    try:
        table = read_parquet(data)
        pairs = zip(table["file_index"].to_pylist(), table["key"].to_pylist(), strict=True)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise IntegrityError(f"the stored keys cannot be read: {error}") from error
    return (key for index, key in pairs if index not in left_out)
