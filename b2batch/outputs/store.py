"""Where an output lives: keys to bytes, with the one primitive all correctness rests on.

``put_if_absent`` creates an object whole or not at all, and refuses when the name is taken. Everything
else may be weak (a listing that is late, a reply that is lost). ``LocalStore`` builds it from a
staged file, fsync and ``link(2)``, which refuses an existing name on local disks and on NFS;
``s3_store`` from a conditional PUT.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from b2batch.errors import Fenced, OutputError, StorageError, StorageFull
from b2batch.failpoints import failpoint
from b2batch.outputs.layout import META, RunKeys
from b2batch.spec import resolve_env

_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_RMTREE_TRIES = 5
_SCRATCH_MODE = 0o700


class Store(Protocol):
    """Keys (``/``-separated, relative) to bytes.

    Missing keys raise FileNotFoundError; what else fails, and may pass, raises StorageError.
    """

    uri: str

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Create ``key`` whole and durably; False, and nothing changed, when it exists.

        A StorageError leaves it open whether the object was created: whoever retries must expect False.
        """

    def put(self, key: str, data: bytes) -> None:
        """Create or replace ``key``; a reader sees the old bytes or the new ones, never a mixture."""

    def read(self, key: str) -> bytes:
        """All bytes of ``key``."""

    def open(self, key: str) -> BinaryIO:
        """``key`` for random access, so that a footer can be read without the rest."""

    def exists(self, key: str) -> bool:
        """Whether ``key`` is there."""

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, size in bytes) of every object whose key starts with ``prefix``, at any depth."""

    def delete(self, key: str) -> None:
        """Remove ``key``; no error when it is not there."""

    def delete_tree(self, key: str) -> None:
        """Remove everything under ``key/``, and the directory itself where the store has such."""

    def age_s(self, key: str) -> float:
        """Seconds since ``key`` was last written, both ends read from the store's own clock.

        Negative where that clock was set back since.
        """

    def probe(self) -> None:
        """Make the place ready for a driver's writes, and prove that a second creation is refused.

        Raises:
            OutputError: it cannot be written, or exclusive creation does not hold there.
        """


def check_key(key: str) -> None:
    """Refuse a key that is absolute, climbs, or could not be a plain path: OutputError."""
    parts = key.split("/")
    if not key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise OutputError(f"{key!r} is not a name inside the output directory")


def storage_error(place: str, error: OSError) -> StorageError:
    """What the operating system says of ``place`` as the error that dispatch and the command line know."""
    kind = StorageFull if error.errno in _NO_SPACE else StorageError
    fault = kind(f"{place}: {error.strerror or error}")
    fault.errno, fault.filename2 = error.errno, error.filename2
    return fault


@contextlib.contextmanager
def _named_faults(place: str) -> Iterator[None]:
    """Let what is said of names pass (missing, taken); anything else that fails is the storage's fault."""
    try:
        yield
    except (StorageError, FileNotFoundError, FileExistsError, NotADirectoryError):
        raise
    except OSError as error:
        raise storage_error(place, error) from error


def prove_exclusive_creation(store: Store) -> None:
    """Create one key twice; OutputError unless the second try is refused."""
    key = f"{META}/probe-{uuid.uuid4().hex}"
    try:
        store.put_if_absent(key, b"first")  # False where only its reply was lost
        was_refused = not store.put_if_absent(key, b"second")
        held = store.read(key) == b"first"
    finally:
        store.delete(key)
    if not was_refused or not held:
        raise OutputError(
            f"{store.uri}: this storage lets a second writer replace an existing object, "
            "so rows could be written twice; choose another output location"
        )


class LocalStore:
    """A directory on a local disk or NFS.

    ``staging`` is the key of the directory in which objects are prepared. Only ``probe`` (the driver)
    makes it: where it is missing, writes raise Fenced, so that removing it stops the stray writers of a
    replaced run. Without ``staging`` the store can only be read and deleted from.
    """

    def __init__(self, root: str | Path, staging: str | None = None) -> None:
        self._root = Path(root).expanduser().resolve()
        self.uri = str(self._root)
        if staging is not None:
            check_key(staging)
        self._staging = staging

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Stage, fsync, link; Fenced when the staging directory is gone."""
        target = self._path(key)
        with _named_faults(str(target)):
            staged = self._stage(data)
            try:
                failpoint("F8")
                _make_directory(target.parent)
                os.link(staged, target)
            except FileExistsError:
                return staged.stat().st_nlink > 1  # NFS: the link was made, only its reply was lost
            except FileNotFoundError:
                raise self._fenced() from None
            finally:
                staged.unlink(missing_ok=True)
            failpoint("F9")
            _fsync_directory(target.parent)
        return True

    def put(self, key: str, data: bytes) -> None:
        """Stage, fsync, rename; Fenced when the staging directory is gone."""
        target = self._path(key)
        with _named_faults(str(target)):
            staged = self._stage(data)
            try:
                _make_directory(target.parent)
                os.replace(staged, target)
            except FileNotFoundError:
                raise self._fenced() from None
            finally:
                staged.unlink(missing_ok=True)
            _fsync_directory(target.parent)

    def read(self, key: str) -> bytes:
        """All bytes of the file."""
        path = self._path(key)
        with _named_faults(str(path)):
            return path.read_bytes()

    def open(self, key: str) -> BinaryIO:
        """The file itself; the caller closes it."""
        path = self._path(key)
        with _named_faults(str(path)):
            return path.open("rb")

    def exists(self, key: str) -> bool:
        """Whether a file (not a directory) stands there."""
        path = self._path(key)
        with _named_faults(str(path)):
            return path.is_file()

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Files in name order; links to directories are listed, not followed."""
        directory, _, start = prefix.rpartition("/")
        if directory:
            check_key(directory)
        with _named_faults(f"{self.uri}/{directory}"):
            yield from self._list(directory, start)

    def delete(self, key: str) -> None:
        """Remove the file; its directory stays."""
        path = self._path(key)
        with _named_faults(str(path)):
            path.unlink(missing_ok=True)

    def delete_tree(self, key: str) -> None:
        """Remove the directory, also while strays still write into it."""
        path = self._path(key)
        for tries_left in reversed(range(_RMTREE_TRIES)):
            try:
                shutil.rmtree(path)
                return
            except FileNotFoundError:
                if not path.exists():
                    return
            except OSError as error:  # a stray put a file there while its directory was being emptied
                if error.errno != errno.ENOTEMPTY or not tries_left:
                    raise storage_error(str(path), error) from error

    def age_s(self, key: str) -> float:
        """The file's time against that of a file made just now, or to the clock here if opened to read."""
        path = self._path(key)
        with _named_faults(str(path)):
            written = path.stat().st_mtime
            if self._staging is None:
                return time.time() - written
            # A fresh file's time comes from whoever keeps the clock of this file system (NFS: the server).
            staged = self._stage(b"")
            now = staged.stat().st_mtime
            staged.unlink(missing_ok=True)
        return now - written

    def probe(self) -> None:
        """Make the directory and its staging directory, and try what commits rest on."""
        staging = self._staging_path()
        try:
            _make_directory(staging.parent)
            _make_directory(staging, _SCRATCH_MODE)
            prove_exclusive_creation(self)
        except NotADirectoryError as error:
            raise OutputError(f"{self.uri}: not a directory ({error})") from error
        except OSError as error:
            if error.filename2 is not None and error.errno in _NO_HARD_LINKS:
                raise OutputError(
                    f"{self.uri}: this file system has no hard links ({os.strerror(error.errno)}), "
                    "so a part cannot be created exclusively; choose a local disk or NFS"
                ) from error
            if error.errno in _NOT_WRITABLE:
                raise OutputError(f"{self.uri} cannot be written: {os.strerror(error.errno)}") from error
            raise error if isinstance(error, StorageError) else storage_error(self.uri, error) from error

    def _path(self, key: str) -> Path:
        check_key(key)
        path = self._root / key
        if not path.resolve().is_relative_to(self._root):
            raise OutputError(f"{path} leads out of the output directory through a link")
        return path

    def _list(self, directory: str, start: str) -> Iterator[tuple[str, int]]:
        try:
            entries = sorted(os.scandir(self._root / directory), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if not entry.name.startswith(start):
                continue
            key = f"{directory}/{entry.name}" if directory else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._list(key, "")
                continue
            with contextlib.suppress(FileNotFoundError):  # removed since the directory was read
                yield key, entry.stat(follow_symlinks=False).st_size

    def _staging_path(self) -> Path:
        if self._staging is None:
            raise OutputError(f"{self.uri} was opened for reading only")
        return self._path(self._staging)

    def _stage(self, data: bytes) -> Path:
        """``data`` in a new file of the staging directory, on disk; removed again when that fails."""
        staged = self._staging_path() / uuid.uuid4().hex
        try:
            descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            raise self._fenced() from None
        try:
            with os.fdopen(descriptor, "wb") as file:
                half = len(data) // 2
                file.write(data[:half])
                failpoint("F7")
                file.write(data[half:])
                file.flush()
                os.fsync(descriptor)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return staged

    def _fenced(self) -> Fenced:
        return Fenced(f"{self._root / (self._staging or '')} is gone: this run was replaced by another one")


def open_store(uri: str, run_id: str | None = None) -> Store:
    """The store of an output path, staging for ``run_id``; without one it can only be read.

    ``{run8}`` in the path becomes the run's short id.

    Raises:
        OutputError: the scheme is not supported, or ``{run8}`` stands in a path without a run.
    """
    text = resolve_env(uri)
    if "{run8}" in text:
        if run_id is None:
            raise OutputError(f"{uri}: which run is meant by {{run8}}? Give the directory itself")
        text = text.replace("{run8}", run_id[:8])
    staging = RunKeys(run_id[:8]).staging if run_id else None
    scheme, mark, place = text.rpartition("://")
    if not mark or scheme == "file":
        return LocalStore(place, staging)
    if scheme == "s3":
        bucket, _, prefix = place.partition("/")
        return _open_s3(bucket, prefix, staging)
    raise OutputError(
        f"output.path: {scheme}:// can be read from, not written to: no creation that refuses a second "
        "writer was proved there; give s3://BUCKET/PREFIX, or a local or NFS path that every replica sees"
    )


def _open_s3(bucket: str, prefix: str, staging: str | None) -> Store:
    try:  # not needed, and slow to import, where the output is a directory
        from b2batch.outputs.s3_store import S3Store
    except ImportError as error:
        raise OutputError(
            f"output.path: s3:// needs {error.name}: pip install 'b2batch[s3]', on every node"
        ) from error
    return S3Store(bucket, prefix, staging)


def _make_directory(path: Path, mode: int = 0o775) -> None:
    """``path`` and its parents, never world-writable, each made durable in the one above."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=mode)
        _fsync_directory(path.parent)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
