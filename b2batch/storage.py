"""One way to a file system from a path or URI, for inputs and outputs alike (pyarrow and fsspec)."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from b2batch.errors import SpecError, StorageError
from b2batch.spec import resolve_env

_TRIES = 3
_PASSING = re.compile(
    r"SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|NETWORK_CONNECTION|REQUEST_TIMEOUT|THROTTLING"
    r"|HTTP status 5|timed? ?out|connection",
    re.IGNORECASE,
)
_Result = TypeVar("_Result")
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY_SECRET = re.compile(r"([?&][^=&\s]*(?:secret|token|key|password|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def mask_credentials(text: str) -> str:
    """``text`` without the user, password and secret query values of any URI in it."""
    return _QUERY_SECRET.sub(r"\1***", _USER_INFO.sub("***@", text))


def may_pass(error: Exception) -> bool:
    """Whether an error of a remote file system is about the way to the bytes, and not about the request."""
    return isinstance(error, OSError) and error.errno is None and bool(_PASSING.search(str(error)))


def retried(call: Callable[[], _Result], place: str) -> _Result:
    """What ``call`` returns, called again where the network or an object store failed it.

    Arrow's file systems ask again by themselves, but not when a connection breaks within a reply.

    Raises:
        StorageError: it failed each time. Faults of a local disk, which have an ``errno``, pass at once.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            return call()
        except OSError as error:
            if error.errno is not None or isinstance(error, StorageError):
                raise
            if not tries_left:
                raise StorageError(f"{place}: {mask_credentials(str(error))}") from error
            time.sleep(random.uniform(0.0, 2.0 ** (_TRIES - tries_left - 2)))
    raise AssertionError("the last try returns or raises")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of ``uri`` and the path within it.

    A plain path is local and made absolute. ``s3://``, ``gs://``, ``hdfs://`` go to pyarrow's own
    implementations, any other scheme (``hf://``) to fsspec. Environment references are resolved here;
    credentials come from the environment, and for S3 so do region and endpoint, as for an output.

    Raises:
        SpecError: the scheme is not known, or its library is not installed.
    """
    text = resolve_env(uri)
    if "://" not in text:
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    if text.startswith("s3://") and not {"?", "@"} & set(text):
        path = text.removeprefix("s3://").rstrip("/")
        return _open_s3(path.partition("/")[0], *_s3_environment()), path
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


def _s3_environment() -> tuple[str | None, str | None]:
    """The endpoint and region that the environment names, by the variables that boto3 reads too."""
    environ = os.environ
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    return endpoint, environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")


@lru_cache
def _open_s3(bucket: str, endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    """One for all files of a bucket: to find its region out takes a request."""
    place = urlsplit(endpoint or "")
    if region is None and endpoint is None:
        region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=place.netloc or None,
        scheme=place.scheme or "https",
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=8),
        connect_timeout=10,
        request_timeout=60,
    )
