"""Whether an input file is still the one that was planned: a quick look at what the store says of it."""

from __future__ import annotations

import os
from dataclasses import replace

import pyarrow.fs as pafs

from b2batch.errors import DriftError
from b2batch.inputs.files import FoundFile, InputFile
from b2batch.inputs.streams import fast_fingerprint, full_fingerprint, hash_start


def stored_version(file: FoundFile) -> str | None:
    """What the store says of the file now, None where there is none; another text for every write.

    An object store's entity tag. For a local file its size and both its times: a program can set the
    one of the content, to that of the file it replaces, but never the one of the inode.
    """
    filesystem, path = file.locate()
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        return None
    times = [str(info.mtime_ns or "")]
    if isinstance(filesystem, pafs.LocalFileSystem):
        times.append(str(os.stat(path).st_ctime_ns))
    return " ".join([str(info.size or 0), *times, *_entity_tag(filesystem, path)])


def _entity_tag(filesystem: pafs.FileSystem, path: str) -> list[str]:
    if isinstance(filesystem, pafs.PyFileSystem):
        known = filesystem.handler.fs.info(path)
        return [str(known[key]) for key in ("ETag", "etag") if known.get(key)]
    if isinstance(filesystem, pafs.LocalFileSystem):
        return []
    with filesystem.open_input_file(path) as stored:
        return [str(value) for key, value in stored.metadata().items() if key in (b"ETag", "ETag")]


def check_unchanged(file: InputFile, known: str) -> str:
    """Compare the file with the plan: at a glance, or by its content where the glance tells nothing.

    ``known`` is a version that holds what was planned (at first ``file.etag``); the answer is the
    version now. A file that was only touched, copied back or linked to is the same file; so is one that
    may grow, and did, behind what was planned.

    Raises:
        DriftError: the file was removed, or its content is not what was planned.
    """
    version = stored_version(file)
    if version is None:
        raise _drift(file, "the file is gone")
    if version == known:
        return version
    size = int(version.partition(" ")[0])
    has_grown = file.is_appendable and size > file.size
    if size != file.size and not has_grown:
        raise _drift(file, f"{file.size} bytes became {size}")
    if fingerprint_of(file, has_grown) != file.fingerprint:
        raise _drift(file, "it was written since it was planned")
    return version


def fingerprint_of(file: InputFile, has_grown: bool = False) -> str:
    """The fingerprint of what stands there now, of the kind that the plan has; of as much as was planned."""
    is_fast = file.fingerprint.startswith("fast:")
    if has_grown:
        return fast_fingerprint(file) if is_fast else f"sha256:{hash_start(file, file.size).hexdigest()}"
    if not is_fast:
        return full_fingerprint(file)
    filesystem, path = file.locate()
    return fast_fingerprint(replace(file, modified=str(filesystem.get_file_info(path).mtime_ns or "")))


def _drift(file: InputFile, what: str) -> DriftError:
    return DriftError(f"{file.uri}: the input changed during the run: {what}")
