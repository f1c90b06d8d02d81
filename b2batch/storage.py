"""One way to a file system from a path or URI, for inputs and outputs alike (pyarrow and fsspec)."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.fs as pafs

from b2batch.errors import SpecError
from b2batch.spec import resolve_env

_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY_SECRET = re.compile(r"([?&][^=&\s]*(?:secret|token|key|password|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """``text`` without the user, password and secret query values of any URI in it."""
    return _QUERY_SECRET.sub(r"\1***", _USER_INFO.sub("***@", text))


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of ``uri`` and the path within it.

    A plain path is local and made absolute. ``s3://``, ``gs://``, ``hdfs://`` go to pyarrow's own
    implementations, any other scheme to fsspec. Environment references are resolved here.

    Raises:
        SpecError: the scheme is not known, or its library is not installed.
    """
    text = resolve_env(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(text)
        return filesystem, path
    except (ValueError, OSError):  # not one of pyarrow's schemes
        pass
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise SpecError(f"{uri}: no file system for this scheme: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path
