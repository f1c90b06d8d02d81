"""The bytes of a file as one forward stream: decompressed, bounded, fingerprinted on the way."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa

from b2batch.errors import InputError
from b2batch.inputs.files import FoundFile, compression_of

BLOCK_BYTES = 1 << 20
MAX_EXPANSION = 200
MIN_EXPANDED_BYTES = 64 << 20
_END_BYTES = 64 * 1024


class HashedFile(io.RawIOBase):
    """A forward view of a stored file that keeps the sha256 and the count of the bytes it gave.

    It may begin at ``start``, with ``hashed`` the sha256 of what stands before. One that ``is_bounded``
    ends at the size that the store said, however long the file is by now.
    """

    def __init__(self, file: FoundFile, start: int = 0, hashed: Any = None, is_bounded: bool = False) -> None:
        filesystem, path = file.locate()
        if start:
            self._stored = filesystem.open_input_file(path)
            self._stored.seek(start)
        else:
            self._stored = filesystem.open_input_stream(path, compression=None)
        self._sha256 = hashed.copy() if hashed else hashlib.sha256()
        self._file = file
        self._is_bounded = is_bounded
        self.num_bytes = start

    def readable(self) -> bool:
        """True: it is a file to read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes as they are stored."""
        if self._is_bounded:
            size = (
                self._file.size - self.num_bytes if size < 0 else min(size, self._file.size - self.num_bytes)
            )
        block: bytes = self._stored.read(size)
        self._sha256.update(block)
        self.num_bytes += len(block)
        return block

    def hashed(self) -> Any:
        """A copy of the sha256 object as it is now."""
        return self._sha256.copy()

    def fingerprint(self) -> str:
        """``sha256:…`` of the whole file; InputError when its length is not what the store said."""
        while self.read(BLOCK_BYTES):
            pass
        if self.num_bytes != self._file.size:
            raise InputError(f"{self._file.uri}: was written while it was read; give a file that is complete")
        return f"sha256:{self._sha256.hexdigest()}"

    def close(self) -> None:
        """Give the file back; may be called again."""
        self._stored.close()
        super().close()


def full_fingerprint(file: FoundFile) -> str:
    """``sha256:…`` of the stored bytes, in one pass of its own."""
    with HashedFile(file) as stored:
        return stored.fingerprint()


def hash_start(file: FoundFile, num_bytes: int) -> Any:
    """The sha256 object of the first ``num_bytes`` that are stored."""
    with HashedFile(replace(file, size=num_bytes), is_bounded=True) as stored:
        while stored.read(BLOCK_BYTES):
            pass
        return stored.hashed()


def fast_fingerprint(file: FoundFile) -> str:
    """``fast:…`` over size, time and both ends; a change in the middle shows only by its time."""
    filesystem, path = file.locate()
    digest = hashlib.sha256(f"{file.size} {file.modified} ".encode())
    with filesystem.open_input_file(path) as stored:
        num_bytes = min(file.size, _END_BYTES)  # and not what was appended since
        digest.update(stored.read(num_bytes))
        stored.seek(file.size - num_bytes)
        digest.update(stored.read(num_bytes))
    return f"fast:{digest.hexdigest()}"


class TextStream:
    """The decompressed bytes of a file, read forward; ``position`` counts those already given.

    With ``hashed``, which opens the file as ``HashedFile``, the stored bytes are hashed as they go by, and
    the stream cannot move.
    """

    def __init__(self, file: FoundFile, hashed: Callable[[], HashedFile] | None = None) -> None:
        self._compression = compression_of(file)
        self._max_bytes = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * file.size)
        self._file = file
        self._hashed = hashed() if hashed else None
        self._stream = self._open()
        self.position = self._hashed.num_bytes if self._hashed else 0

    def _open(self) -> Any:
        filesystem, path = self._file.locate()
        if self._hashed is None and self._compression is None:
            return filesystem.open_input_file(path)
        if self._hashed is None:
            return filesystem.open_input_stream(path, compression=self._compression)
        if self._compression is None:
            return self._hashed
        return pa.CompressedInputStream(pa.PythonFile(self._hashed, mode="r"), self._compression)

    def fingerprint(self) -> str:
        """Of the stored bytes: the full one where they were hashed, else the fast one."""
        return self._hashed.fingerprint() if self._hashed else fast_fingerprint(self._file)

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, fewer only at the end; InputError for a file that expands without end."""
        block: bytes = self._stream.read(size)
        self.position += len(block)
        if self._compression is not None and self.position > self._max_bytes:
            raise InputError(
                f"{self._file.uri}: {self._file.size} bytes expand to more than {self._max_bytes} "
                f"({MAX_EXPANSION} times is the limit); decompress the file if it is meant to"
            )
        return block

    def move_to(self, position: int) -> None:
        """Go to ``position``: a seek in a plain file, else reading on or beginning again."""
        if self._compression is None:
            self._stream.seek(position)
            self.position = position
            return
        if position < self.position:
            self.close()
            self._stream = self._open()
            self.position = 0
        while self.position < position and self.read(min(BLOCK_BYTES, position - self.position)):
            pass

    def close(self) -> None:
        """Give the file back; may be called again."""
        self._stream.close()
