"""Bytes into lines, in bounded memory. Only ``\\n`` ends a line: U+2028, NEL or VT in a text do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import xxhash

from b2batch.inputs.streams import BLOCK_BYTES

_BOM = b"\xef\xbb\xbf"
_BLANK = b" \t\r"
_NOT_CONTENT = len(_BOM) + len(b"\r")


class Line(NamedTuple):
    """One line (a plain tuple, for speed: a scan makes one for each of maybe billions).

    It stands at ``start:stop`` with its ending. ``content`` has no ending and no byte-order mark;
    it is None when the line is too long to hold, and then ``digest`` is its hash.
    """

    start: int
    stop: int
    content: bytes | None
    digest: bytes | None = None

    @property
    def is_blank(self) -> bool:
        """Whether the line holds white space only, and so is no row."""
        content = self.content
        return content is not None and (not content or (content[0] in _BLANK and not content.strip(_BLANK)))

    @property
    def row_hash(self) -> bytes:
        """xxh128 of the content."""
        return self.digest if self.content is None else xxhash.xxh128_digest(self.content)  # type: ignore[return-value]


class _Begun:
    """A line whose end has not come yet; over ``max_bytes`` only its hash and length are kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept = bytearray()
        self._hash: xxhash.xxh128 | None = None
        self.num_bytes = 0

    def add(self, piece: bytes) -> None:
        self.num_bytes += len(piece)
        self._kept += piece
        if self.num_bytes > self._max_bytes + _NOT_CONTENT:
            self._hash = self._hash or xxhash.xxh128()
            self._hash.update(bytes(self._kept[:-1]))
            del self._kept[:-1]

    def end(self, start: int, stop: int, max_bytes: int) -> Line:
        if self._hash is None:
            return _line(start, stop, bytes(self._kept), max_bytes)
        self._hash.update(b"" if self._kept == b"\r" else bytes(self._kept))
        return Line(start, stop, None, self._hash.digest())


def _line(start: int, stop: int, content: bytes, max_bytes: int) -> Line:
    if content[-1:] == b"\r":
        content = content[:-1]
    if start == 0:
        content = content.removeprefix(_BOM)
    if len(content) > max_bytes:
        return Line(start, stop, None, xxhash.xxh128_digest(content))
    return Line(start, stop, content)


def split_lines(
    read: Callable[[int], bytes], start: int, num_bytes: int | None, max_bytes: int
) -> Iterator[Line]:
    """The lines of the next ``num_bytes`` (None: all) that ``read`` gives, the first at offset ``start``.

    A line of more than ``max_bytes`` comes without its content. What follows the last ``\\n`` is a
    line too, unless it is empty.
    """
    begun: _Begun | None = None
    left = num_bytes
    while block := read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
        left = None if left is None else left - len(block)
        *ended, rest = block.split(b"\n")
        for piece in ended:
            if begun is None:
                stop = start + len(piece) + 1
                yield _line(start, stop, piece, max_bytes)
            else:
                begun.add(piece)
                stop = start + begun.num_bytes + 1
                yield begun.end(start, stop, max_bytes)
                begun = None
            start = stop
        if rest:
            begun = begun or _Begun(max_bytes)
            begun.add(rest)
    if begun is not None:
        yield begun.end(start, start + begun.num_bytes, max_bytes)
