"""From the paths of a job file to the files they name: literal files, directories, globs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from b2batch.errors import InputError, StorageError
from b2batch.inputs.files import FoundFile, mask_secrets
from b2batch.spec import InputSpec, resolve_env
from b2batch.storage import may_pass, open_filesystem

_HIDDEN = ("_", ".")


@dataclass(frozen=True, slots=True)
class _Place:
    """A path or URI in parts: ``prefix`` is a scheme with its authority, empty for local paths."""

    prefix: str
    parts: tuple[str, ...]
    query: str = ""

    @property
    def uri(self) -> str:
        return ("/".join([self.prefix, *self.parts]) or "/") + self.query

    def above(self, num_parts: int) -> _Place:
        return _Place(self.prefix, self.parts[:num_parts], self.query)


@dataclass(frozen=True, slots=True)
class _Match:
    """A file found at ``path`` below ``base``."""

    base: _Place
    path: str
    info: pafs.FileInfo


def list_files(spec: InputSpec) -> list[FoundFile]:
    """All files that ``spec.path`` names, each once, sorted by the bytes of their relative path.

    A directory stands for every file below it whose path has no name that begins with ``_`` or
    ``.``; a glob (``*``, ``?``, ``[…]``, and ``**`` for any directories) matches such names only
    where it spells that character out. Paths are relative to what all entries have in common.

    Raises:
        InputError: a path does not exist, or a pattern or directory gives no file; an incremental job may
            find none yet where the directory is there.
        StorageError: an object store does not answer.
    """
    matches = [match for text in spec.path for match in _matches(text, may_be_empty=spec.incremental)]
    files = {(file.root, file.path): file for file in _rooted(matches)}
    return sorted(files.values(), key=lambda file: (file.path.encode("utf-8", "surrogateescape"), file.root))


def _matches(text: str, may_be_empty: bool) -> list[_Match]:
    place = _parse_place(text)
    magic = (i for i, part in enumerate(place.parts) if re.search(r"[*?[]", part))
    base = place.above(next(magic, len(place.parts)))
    pattern = place.parts[len(base.parts) :]
    try:
        found = list(_look_up(base, pattern))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if may_pass(error):
            raise StorageError(mask_secrets(f"input.path: {text}: cannot be listed: {error}")) from error
        raise InputError(mask_secrets(f"input.path: {text}: cannot be listed: {error}")) from error
    if not found and not (may_be_empty and _is_directory(base)):
        raise InputError(mask_secrets(f"input.path: {text}: {_nothing_found(base, pattern)}"))
    return found


def _is_directory(place: _Place) -> bool:
    filesystem, path = open_filesystem(place.uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.Directory)


def _nothing_found(base: _Place, pattern: Sequence[str]) -> str:
    if pattern:
        return "no file matches this pattern"
    if _is_directory(base):
        return "the directory holds no input file (names that begin with _ or . do not count)"
    return "there is no such file or directory"


def _parse_place(text: str) -> _Place:
    """The parts of a path or URI as written: the value of ``${env:NAME}`` must not reach the plan."""
    resolved = resolve_env(text)
    if "://" not in resolved:
        return _parse_local(text, resolved)
    location, mark, query = text.partition("?")
    scheme, _, rest = location.rpartition("://")
    authority, *parts = rest.split("/")
    prefix = f"{scheme}://{authority}" if scheme else authority
    return _Place(prefix, tuple(part for part in parts if part), mark + query)


def _parse_local(text: str, resolved: str) -> _Place:
    """An absolute path, which begins with a reference where the one that it stands for is absolute."""
    is_absolute = Path(resolved).expanduser().is_absolute()
    whole = text if is_absolute else f"{Path.cwd()}/{text}"
    first, *parts = str(Path(whole).expanduser()).split("/")
    return _Place(first, tuple(part for part in parts if part))


def _look_up(base: _Place, pattern: Sequence[str]) -> Iterator[_Match]:
    filesystem, base_path = open_filesystem(base.uri)
    literal = "/".join([base_path.rstrip("/"), *pattern]) if pattern else base_path
    info = filesystem.get_file_info(literal)
    if info.type == pafs.FileType.File:
        above = base if pattern else base.above(-1)
        yield _Match(above, "/".join(pattern) or base.parts[-1], info)
    elif info.type == pafs.FileType.Directory:
        directory = _Place(base.prefix, (*base.parts, *pattern), base.query)
        for path, below in _walk(filesystem, literal, recursive=True):
            if not any(name.startswith(_HIDDEN) for name in path.split("/")):
                yield _Match(directory, path, below)
    elif pattern:
        matcher = _glob_regex(pattern)
        for path, below in _walk(filesystem, base_path, recursive=len(pattern) > 1 or "**" in pattern[0]):
            if matcher.fullmatch(path):
                yield _Match(base, path, below)


def _walk(filesystem: pafs.FileSystem, path: str, recursive: bool) -> Iterator[tuple[str, pafs.FileInfo]]:
    selector = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
    for info in filesystem.get_file_info(selector):
        if info.type == pafs.FileType.File:
            yield info.path.removeprefix(path).lstrip("/"), info


def _glob_regex(pattern: Sequence[str]) -> re.Pattern[str]:
    """A regex over relative paths. ``**`` alone between slashes stands for any number of directories."""
    last = len(pattern) - 1
    pieces = []
    for i, part in enumerate(pattern):
        if part == "**":
            pieces.append(r"(?:(?![_.])[^/]+/)*" + (r"(?![_.])[^/]+" if i == last else ""))
        else:
            shown = "" if part.startswith(_HIDDEN) else r"(?![_.])"
            pieces.append(shown + _glob_part(part) + ("" if i == last else "/"))
    return re.compile("".join(pieces), re.DOTALL)


def _glob_part(part: str) -> str:
    tokens = re.findall(r"\[[!^]?\]?[^\]]*\]|\*+|\?|.", part, re.DOTALL)
    return "".join(_glob_token(token) for token in tokens)


def _glob_token(token: str) -> str:
    if token.startswith("*"):
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if len(token) > 1:
        negated = token[1] in "!^"
        members = token[1 + negated : -1].replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
        return f"[{'^' if negated else ''}{members}]"
    return re.escape(token)


def _rooted(matches: Iterable[_Match]) -> Iterator[FoundFile]:
    """The matches relative to one root where they have one, so that equal names stay apart."""
    matches = list(matches)
    shared = _common_base([match.base for match in matches])
    for match in matches:
        root = shared or match.base
        path = "/".join([*match.base.parts[len(root.parts) :], match.path])
        yield FoundFile(root.uri, path, match.info.size or 0, str(match.info.mtime_ns or ""))


def _common_base(bases: Sequence[_Place]) -> _Place | None:
    if len({(base.prefix, base.query) for base in bases}) != 1:
        return None
    depth = 0
    for names in zip(*(base.parts for base in bases), strict=False):
        if len(set(names)) > 1:
            break
        depth += 1
    return bases[0].above(depth)
