"""One input file: where it stands, what format it has, whether it is still the same."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs

from b2batch.errors import InputError
from b2batch.spec import mask_env
from b2batch.storage import mask_credentials, open_filesystem

ALLOWED = "JSON Lines (plain, gzip or zstd) and Parquet"
_SNIFF_BYTES = 64 * 1024
_BOM = b"\xef\xbb\xbf"
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FOREIGN_MAGIC = {
    b"PK\x03\x04": "a ZIP archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"ARROW1": "Arrow IPC",
    b"Obj\x01": "Avro",
    b"ORC": "ORC",
    b"\x89PNG": "a PNG image",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_JSONL_NAME = re.compile(r"\.(jsonl|ndjson|jsonlines)(\.(gz|gzip|zst|zstd))?$", re.IGNORECASE)
# Faults of the path to the bytes, not of the bytes: left as they are, because trying again may help.
_REMOTE_FAULT = re.compile(r"AWS Error|google::cloud|curl|[Tt]imed? ?out|[Cc]onnection")
_CALLER_ERRNO = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR}


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file as the store lists it.

    ``path`` is relative to ``root``, and the same on every machine; ``root`` is an absolute local
    path or a URI in which ``${env:NAME}`` is still a reference. ``modified`` is the time of the last
    write in nanoseconds, empty where the store has none.
    """

    root: str
    path: str
    size: int
    modified: str

    @property
    def uri(self) -> str:
        """Where the file stands, for people: credentials in it are masked."""
        root, mark, query = self.root.partition("?")
        return mask_secrets(f"{root.rstrip('/')}/{self.path}{mark}{query}")

    def locate(self) -> tuple[pafs.FileSystem, str]:
        """The file system and the path within it."""
        filesystem, base = open_filesystem(self.root)
        return filesystem, f"{base.rstrip('/')}/{self.path}"


@dataclass(frozen=True, slots=True)
class InputFile(FoundFile):
    """A file of a plan: found, recognised and scanned.

    ``etag`` is the store's version of it before the scan (see ``stored_version``). ``fingerprint`` is
    ``sha256:…`` of the stored bytes, or ``fast:…`` over size, time and both ends. ``fault`` says why an
    unreadable file is one. ``tick`` is the tick whose run planned it, empty for none.

    In an incremental plan ``generation`` says which one planned it (else 0). A file that ``is_appendable``
    may have grown since: ``size`` and ``fingerprint`` are of what was planned. What was appended is a file
    of the plan by itself, whose rows begin at the byte ``start``. ``num_known`` rows were left out since the
    output held their key. The rows of a ``superseded`` file were replaced by those of a later one.
    """

    etag: str
    index: int
    format: str
    num_rows: int
    num_blank: int
    fingerprint: str
    fault: str = ""
    tick: str = ""
    generation: int = 0
    is_appendable: bool = False
    start: int = 0
    num_known: int = 0
    superseded: bool = False


def mask_secrets(text: str) -> str:
    """``text`` without the credentials of any URI, and without what the environment put in."""
    return mask_credentials(mask_env(text))


@contextmanager
def named_faults(file: FoundFile) -> Iterator[None]:
    """Turn what a library says of unreadable bytes into an InputError that names the file.

    Faults of the disk or the network pass: they are not the caller's, and trying again may help.
    """
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file.uri}: cannot be read: {_first_line(error)}") from error
    except OSError as error:
        if _may_pass(error):
            raise
        raise InputError(f"{file.uri}: cannot be read: {_first_line(error)}") from error


def _may_pass(error: OSError) -> bool:
    if error.errno is not None:
        return error.errno not in _CALLER_ERRNO
    return _REMOTE_FAULT.search(str(error)) is not None


def _first_line(error: Exception) -> str:
    return mask_secrets((str(error).splitlines() or [type(error).__name__])[0][:500])


def recognise(file: FoundFile, wanted: str) -> str:
    """The format of ``file``: ``wanted``, or for ``auto`` what its first bytes say.

    Text counts as JSON Lines when its name says so or its first character is ``{``.

    Raises:
        InputError: the file is of no format that can be read.
    """
    if wanted != "auto":
        return wanted
    with named_faults(file):
        compression = compression_of(file)
        head = _read_head(file, compression)
    if head.startswith(b"PAR1") and compression is None:
        return "parquet"
    foreign = next((name for magic, name in _FOREIGN_MAGIC.items() if head.startswith(magic)), None)
    if foreign is None and (_JSONL_NAME.search(file.path) or _looks_like_records(head)):
        return "jsonl"
    raise InputError(f"{file.uri}: is {foreign or 'of an unknown format'}; inputs are {ALLOWED}")


def _looks_like_records(head: bytes) -> bool:
    text = head.removeprefix(_BOM).lstrip(b" \t\r\n")
    return not text or text.startswith(b"{")


def compression_of(file: FoundFile) -> str | None:
    """``gzip``, ``zstd`` or None, from the first bytes; the name does not count."""
    filesystem, path = file.locate()
    with filesystem.open_input_stream(path, compression=None) as stream:
        head = stream.read(4)
    return next((name for magic, name in _COMPRESSION_MAGIC.items() if head.startswith(magic)), None)


def _read_head(file: FoundFile, compression: str | None) -> bytes:
    filesystem, path = file.locate()
    with filesystem.open_input_stream(path, compression=compression) as stream:
        return bytes(stream.read(_SNIFF_BYTES))
