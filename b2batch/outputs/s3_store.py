"""An output on S3, or on a store that speaks it: creation is one PUT that the store itself refuses twice.

``If-None-Match: *`` makes a PUT fail with 412 where the name is taken. A reply that is lost on the way is
asked for again and then answered by 412 too, so whoever gets False looks at what stands there. Botocore
retries what may pass (5xx, timeouts, throttling) with growing, random pauses. Credentials, region and
endpoint come from its environment alone.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, ParamValidationError

from b2batch.errors import Fenced, OutputError, StorageError, StorageFull
from b2batch.failpoints import failpoint
from b2batch.outputs.store import check_key, prove_exclusive_creation

_CLIENT = Config(
    retries={"mode": "standard", "total_max_attempts": 8},
    connect_timeout=10,
    read_timeout=60,
    max_pool_connections=16,
)
_CONFLICT_TRIES = 8
_BODY_TRIES = 4
_TAIL_BYTES = 64 * 1024
_DELETED_AT_ONCE = 1000
_MISSING = {"404", "NoSuchKey", "NotFound"}
_TAKEN = {"412", "PreconditionFailed"}
_CONFLICT = {"409", "ConditionalRequestConflict"}
_FULL = {"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"}
# What no waiting mends. Credentials that ran out are not among them: the next start brings others.
_REFUSED = {
    "400", "401", "403", "501",
    "AccessDenied", "AuthorizationHeaderMalformed", "InvalidAccessKeyId", "InvalidBucketName",
    "InvalidToken", "MethodNotAllowed", "NoSuchBucket", "NotImplemented", "PermanentRedirect",
    "SignatureDoesNotMatch",
}  # fmt: skip


class S3Store:
    """The objects under ``s3://bucket/prefix``.

    ``staging`` names an object that ``probe`` (the driver) makes and without which every write raises
    Fenced: as with a directory's staging, removing it stops the stray writers of a replaced run. A write
    that is under way in that moment still succeeds; ``finalise`` and ``verify`` know such parts by name.
    """

    def __init__(self, bucket: str, prefix: str, staging: str | None = None) -> None:
        if not bucket or any(mark in bucket for mark in "@?"):
            raise OutputError(
                f"output.path: s3://{bucket.rpartition('@')[2]}: expected s3://BUCKET/PREFIX; credentials, "
                "region and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_REGION, …)"
            )
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.uri = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._staging = staging
        self._was_answered = False
        try:
            self._client = _make_client()
        except (BotoCoreError, ValueError) as error:
            raise OutputError(f"{self.uri}: {error}") from error

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """One conditional PUT; Fenced when the run was replaced."""
        self._check_not_fenced()
        failpoint("F8")
        for tries_left in reversed(range(_CONFLICT_TRIES)):
            try:
                self._ask(key, "put_object", Body=data, IfNoneMatch="*")
            except StorageError as error:
                code = _code(error)
                if code in _TAKEN:
                    return False
                if code not in _CONFLICT or not tries_left:
                    raise
                _pause(_CONFLICT_TRIES - tries_left)  # somebody is creating it this moment
            else:
                failpoint("F9")
                return True
        raise AssertionError("the last try returns or raises")

    def put(self, key: str, data: bytes) -> None:
        """One PUT; Fenced when the run was replaced."""
        self._check_not_fenced()
        self._ask(key, "put_object", Body=data)

    def read(self, key: str) -> bytes:
        """All bytes of the object."""
        return self._read_body(key)[0]

    def open(self, key: str) -> BinaryIO:
        """The object, of which only what is read is fetched; its end, where a footer stands, at once."""
        return io.BufferedReader(_ObjectFile(lambda span: self._read_body(key, span)), _TAIL_BYTES)

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self._ask(key, "head_object")
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Objects in name order, a page of 1,000 at a time."""
        directory = prefix.rpartition("/")[0]
        if directory:
            check_key(directory)
        start: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix + prefix, **start)
            for found in page.get("Contents", ()):
                yield found["Key"].removeprefix(self._prefix), found["Size"]
            if not page.get("IsTruncated"):
                return
            start = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """Remove the object; no error when it is not there."""
        self._ask(key, "delete_object")

    def delete_tree(self, key: str) -> None:
        """Remove the object that fences first, so that nothing is added while the rest goes."""
        self.delete(key)
        keys = [below for below, _ in self.list(f"{key}/")]
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            objects = [{"Key": self._prefix + below} for below in keys[first : first + _DELETED_AT_ONCE]]
            answer = self._call(
                "delete_objects", Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
            )
            for fault in answer.get("Errors", ()):
                raise StorageError(f"{self.uri}: {fault.get('Key')}: {fault.get('Message')}")

    def age_s(self, key: str) -> float:
        """``Date`` of the reply less ``Last-Modified``: both are the store's, in whole seconds."""
        answer = self._ask(key, "head_object")
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if date is None:
            raise StorageError(f"{self.uri}: the store does not tell its time, so no lease can be judged")
        return float((parsedate_to_datetime(date) - answer["LastModified"]).total_seconds())

    def probe(self) -> None:
        """Make the object without which writes are fenced, and try what commits rest on."""
        self._was_answered = False  # that it can be read does not say that it can be written
        self._ask(self._staging_key(), "put_object", Body=b"")
        prove_exclusive_creation(self)

    def _staging_key(self) -> str:
        if self._staging is None:
            raise OutputError(f"{self.uri} was opened for reading only")
        return self._staging

    def _check_not_fenced(self) -> None:
        if not self.exists(self._staging_key()):
            raise Fenced(f"{self.uri}/{self._staging} is gone: this run was replaced by another one")

    def _read_body(self, key: str, span: str | None = None) -> tuple[bytes, int]:
        """The bytes of the object, or of a ``Range`` of it, and its whole size."""
        ranged = {"Range": span} if span else {}
        for tries_left in reversed(range(_BODY_TRIES)):
            try:
                answer = self._ask(key, "get_object", **ranged)
                data = answer["Body"].read()
            except (BotoCoreError, OSError) as error:  # the connection broke within the body
                if isinstance(error, StorageError | FileNotFoundError):
                    raise
                if not tries_left:
                    raise StorageError(f"{self.uri}/{key}: {error}") from error
                _pause(_BODY_TRIES - tries_left)
            else:
                whole = answer.get("ContentRange", "").rpartition("/")[2]
                return data, int(whole or answer["ContentLength"])
        raise AssertionError("the last try returns or raises")

    def _ask(self, key: str, operation: str, **arguments: Any) -> Any:
        check_key(key)
        return self._call(operation, key, Bucket=self._bucket, Key=self._prefix + key, **arguments)

    def _call(self, operation: str, key: str = "", **arguments: Any) -> Any:
        """The store's answer.

        Raises:
            FileNotFoundError: there is no such object.
            OutputError: refused, and nothing was ever granted: the place or the credentials are wrong.
            StorageError: all else.
        """
        place = f"{self.uri}/{key}" if key else self.uri
        try:
            answer = getattr(self._client, operation)(**arguments)
        except ClientError as error:
            fault = error.response["Error"]
            if fault["Code"] in _MISSING:
                raise FileNotFoundError(place) from error
            said = f"{place}: {fault['Code']}: {fault.get('Message') or operation}"
            if fault["Code"] in _REFUSED and not self._was_answered:
                raise OutputError(said) from error
            raise (StorageFull if fault["Code"] in _FULL else StorageError)(said) from error
        except (NoCredentialsError, ParamValidationError) as error:
            raise OutputError(f"{place}: {error}") from error
        except BotoCoreError as error:
            raise StorageError(f"{place}: {error}") from error
        self._was_answered = True
        return answer


@cache
def _make_client() -> Any:
    """One client a process: it takes a while to make, and threads may share it."""
    return boto3.session.Session().client("s3", config=_CLIENT)


class _ObjectFile(io.RawIOBase):
    """Random access by ranges. The tail is fetched first: it tells the size, and holds Parquet's footer."""

    def __init__(self, fetch: Callable[[str], tuple[bytes, int]]) -> None:
        self._fetch = fetch
        self._tail, self._size = _fetch_tail(fetch)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._position + len(buffer))
        if stop <= self._position:
            return 0
        data = self._span(self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _span(self, start: int, stop: int) -> bytes:
        tail_start = self._size - len(self._tail)
        if start >= tail_start:
            return self._tail[start - tail_start : stop - tail_start]
        return self._fetch(f"bytes={start}-{stop - 1}")[0]


def _fetch_tail(fetch: Callable[[str], tuple[bytes, int]]) -> tuple[bytes, int]:
    try:
        return fetch(f"bytes=-{_TAIL_BYTES}")
    except StorageError as error:
        if _code(error) in {"416", "InvalidRange"}:  # an empty object has no range
            return b"", 0
        raise


def _code(error: StorageError) -> str:
    """What the store answered, or nothing where no answer came."""
    cause = error.__cause__
    return str(cause.response["Error"]["Code"]) if isinstance(cause, ClientError) else ""


def _pause(attempt: int) -> None:
    """Longer with each attempt, and never the same for two that collided."""
    time.sleep(random.uniform(0.0, min(5.0, 0.1 * 2.0**attempt)))
