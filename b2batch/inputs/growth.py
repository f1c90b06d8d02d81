"""How a plan grows: what is new in the input since the plan that an output holds.

    a file not planned before        all its rows
    a JSON Lines file that grew      the rows behind those planned, once their hash is found unchanged
    a file with other content        by ``input.on_changed``: refused, left as it was, or planned anew in
                                     place of its old rows
    a planned file that is gone      nothing: its rows are labelled

A file is known by where it stands. With ``input.key`` a row whose key is planned already is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from b2batch.errors import DriftError, InputError, NothingToDo
from b2batch.inputs.files import FoundFile, InputFile, compression_of, named_faults, recognise
from b2batch.inputs.jsonl import whole_lines
from b2batch.inputs.keys import KeyBook, read_keys
from b2batch.inputs.listing import list_files
from b2batch.inputs.plan import Plan, Units, digest_plan, place_spans, scan_file
from b2batch.inputs.reader import FilePart, FileScan
from b2batch.inputs.schema import SchemaBuilder, check_fits
from b2batch.inputs.streams import fast_fingerprint, full_fingerprint, hash_start
from b2batch.inputs.version import stored_version
from b2batch.spec import InputSpec
from b2batch.storage import retried

_LINE_FORMATS = ("jsonl", "openai-batch")
_LOOK_THREADS = 16
_SHOWN_FILES = 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Growth:
    """A plan that goes on from the one held.

    ``superseded`` are half-open ranges of the indexes of units whose rows it replaces. ``keys`` are those
    of the new rows, as ``KeyBook`` writes them; None where rows have none.
    """

    plan: Plan
    superseded: tuple[tuple[int, int], ...] = ()
    keys: bytes | None = None


class _Standing(Enum):
    NEW = "new"
    SAME = "same"
    GROWN = "grown"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class _Look:
    """A listed file beside what is planned of it."""

    found: FoundFile
    standing: _Standing
    known: tuple[InputFile, ...] = ()
    hashed: Any = None


def grow_plan(
    spec: InputSpec,
    answer_tokens: int = 0,
    tick: str = "",
    held: Plan | None = None,
    read_held_keys: Callable[[], Iterable[bytes]] = lambda: (),
) -> Growth | None:
    """The plan of everything that is in the input by now; None when there is nothing new.

    Args:
        held: the plan to go on from; None: the first one.
        read_held_keys: gives what earlier growths had as ``keys``.

    Raises:
        DriftError: files changed, and ``spec.on_changed`` is ``error``.
        InputError: a file cannot be read, or its columns are not those of ``held``.
        NothingToDo: there is no row at all yet.
    """
    looks = _look(spec, held)
    _apply_policy(spec, looks)
    replaced = frozenset(
        file.index for look in looks if look.standing is _Standing.CHANGED for file in look.known
    )
    grower = _Grower(spec, answer_tokens, tick, held, replaced)
    if spec.key is not None:
        gone = replaced | {file.index for file in (held.files if held else ()) if file.superseded}
        grower.book = KeyBook(key for data in read_held_keys() for key in read_keys(data, gone))
    for look in looks:
        if look.standing is not _Standing.SAME:
            grower.add(look)
    return grower.growth()


def _look(spec: InputSpec, held: Plan | None) -> list[_Look]:
    """Each listed file and how it stands, in the order of the listing."""
    known: dict[tuple[str, str], list[InputFile]] = {}
    for file in held.files if held else ():
        if not file.superseded:
            known.setdefault((file.root, file.path), []).append(file)
    found = list_files(spec)
    with ThreadPoolExecutor(_LOOK_THREADS) as pool:
        looks = pool.map(lambda file: _look_at(file, tuple(known.get((file.root, file.path), ()))), found)
        return list(looks)


def _look_at(found: FoundFile, known: tuple[InputFile, ...]) -> _Look:
    if not known:
        return _Look(found, _Standing.NEW)
    return retried(lambda: _compare(found, known), found.uri)


def _compare(found: FoundFile, known: tuple[InputFile, ...]) -> _Look:
    """The file against the newest that is planned of it, whose fingerprint covers all before."""
    last = known[-1]
    if stored_version(found) == last.etag:
        return _Look(found, _Standing.SAME, known)
    if last.is_appendable and found.size > last.size:
        hashed = hash_start(found, last.size)
        if _starts_as(found, last, hashed) and _goes_on_with_a_line(found, last):
            return _Look(found, _Standing.GROWN, known, hashed)
        return _Look(found, _Standing.CHANGED, known)
    is_same = found.size == last.size and _fingerprint_like(last, found) == last.fingerprint
    return _Look(found, _Standing.SAME if is_same else _Standing.CHANGED, known)


def _starts_as(found: FoundFile, last: InputFile, hashed: Any) -> bool:
    """Whether the bytes that were planned are still those that the file begins with."""
    if not last.fingerprint.startswith("fast:"):
        return bool(f"sha256:{hashed.hexdigest()}" == last.fingerprint)
    return fast_fingerprint(last) == last.fingerprint


def _goes_on_with_a_line(found: FoundFile, last: InputFile) -> bool:
    """Whether a line ends where the planned bytes end: else the last row is another one by now."""
    filesystem, path = found.locate()
    with named_faults(found), filesystem.open_input_file(path) as stored:
        stored.seek(max(0, last.size - 1))
        return b"\n" in stored.read(2) if last.size else True


def _fingerprint_like(last: InputFile, found: FoundFile) -> str:
    if not last.fingerprint.startswith("fast:"):
        return full_fingerprint(found)
    return fast_fingerprint(found)


def _apply_policy(spec: InputSpec, looks: list[_Look]) -> None:
    """Refuse changed files, or take them out, unless they are to be planned anew."""
    changed = [look for look in looks if look.standing is _Standing.CHANGED]
    if not changed or spec.on_changed == "reprocess":
        return
    if spec.on_changed == "skip":
        for look in changed:
            looks.remove(look)
            logger.warning("%s: changed since it was labelled; left as it was", look.found.uri)
        return
    lines = [f"  {look.found.uri}: {look.known[-1].size} -> {look.found.size} bytes" for look in changed]
    if len(lines) > _SHOWN_FILES:
        lines[_SHOWN_FILES:] = [f"  … and {len(lines) - _SHOWN_FILES} more"]
    raise DriftError(
        "input files changed since they were labelled:\n"
        + "\n".join(lines)
        + "\nUndo the change, or say what becomes of their rows: input.on_changed: reprocess | skip"
    )


class _Grower:
    """Puts what is new behind a held plan."""

    def __init__(
        self, spec: InputSpec, answer_tokens: int, tick: str, held: Plan | None, replaced: frozenset[int]
    ) -> None:
        self._spec = spec
        self._answer_tokens = answer_tokens
        self._tick = tick
        self._held = held
        self._replaced = replaced
        self._generation = held.generation + 1 if held else 1
        files = held.files if held else ()
        self._files = [replace(file, superseded=True) if file.index in replaced else file for file in files]
        self._new: list[np.ndarray] = []
        self._builder = SchemaBuilder()
        self.book: KeyBook | None = None

    def add(self, look: _Look) -> None:
        """Scan the new rows of a file; one without any is not planned, and looked at again next time."""
        scan_it = self._scan_grown if look.standing is _Standing.GROWN else self._scan_whole
        file, scan = retried(lambda: scan_it(look), look.found.uri)
        if self._held is not None and scan.num_rows and not file.fault:
            check_fits(self._held.schema, file, scan.schema)
        elif self._held is None:
            self._builder.add(file, scan.schema)
        if scan.num_rows or look.standing is _Standing.CHANGED:
            self._new.append(place_spans(scan.spans, file.index))
            self._files.append(replace(file, tick=self._tick, generation=self._generation))

    def _scan_whole(self, look: _Look) -> tuple[InputFile, FileScan]:
        found = look.found
        is_appendable = self._is_appendable(found)
        if is_appendable:
            found = replace(found, size=whole_lines(found, self._spec))
        file, scan = self._scan(found, FilePart(is_bounded=is_appendable))
        return replace(file, is_appendable=is_appendable and not file.fault), scan

    def _scan_grown(self, look: _Look) -> tuple[InputFile, FileScan]:
        found = replace(look.found, size=whole_lines(look.found, self._spec))
        start = look.known[-1].size
        part = FilePart(
            start=start,
            first_row=sum(file.num_rows + file.num_known for file in look.known),
            num_blank=sum(file.num_blank for file in look.known),
            hashed=look.hashed,
            is_bounded=True,
        )
        file, scan = self._scan(replace(found, size=max(start, found.size)), part)
        return replace(file, is_appendable=not file.fault), scan

    def _scan(self, found: FoundFile, part: FilePart) -> tuple[InputFile, FileScan]:
        index = len(self._files)
        if self.book is None:
            return scan_file(found, index, self._spec, self._answer_tokens, part)
        keys = self.book.open_file(index)
        part = replace(part, is_new=keys.is_new)
        file, scan = scan_file(found, index, self._spec, self._answer_tokens, part)
        self.book.keep(keys)
        return file, scan

    def _is_appendable(self, found: FoundFile) -> bool:
        try:
            with named_faults(found):
                is_plain = compression_of(found) is None
            return is_plain and recognise(found, self._spec.format) in _LINE_FORMATS
        except InputError:
            return False  # the scan says what is wrong with it

    def growth(self) -> Growth | None:
        """The whole plan."""
        held = self._held
        if held is None and not sum(map(len, self._new)):
            raise NothingToDo("the input has no rows yet; the same command looks again")
        if held is not None and not self._new:
            return None
        units = _joined(held, self._new, self._replaced)
        if not len(units):
            raise DriftError(
                "input.on_changed: reprocess: the changed files have no rows any more, and the output would "
                "have none; --overwrite begins it anew"
            )
        schema = self._builder.schema() if held is None else held.schema
        plan = Plan(tuple(self._files), units, schema, digest_plan(self._files, units, schema))
        superseded = _ranges_of(held.units, self._replaced) if held else ()
        return Growth(plan, superseded, self.book.to_bytes() if self.book else None)


def _joined(held: Plan | None, new: Sequence[np.ndarray], replaced: frozenset[int]) -> Units:
    fields = held.units.fields if held else new[0][:0]
    end = held.units.end if held else 0
    indexes = _indexes(held.units) if held else np.arange(0)
    is_kept = ~np.isin(fields[:, 0], list(replaced))
    added = np.concatenate([fields[:0], *new])
    joined = np.concatenate([fields[is_kept], added])
    numbers = np.concatenate([indexes[is_kept], np.arange(end, end + len(added))])
    end += len(added)
    return Units(joined) if end == len(joined) else Units(joined, numbers, end)


def _indexes(units: Units) -> np.ndarray:
    return np.arange(len(units)) if units.indexes is None else units.indexes


def _ranges_of(units: Units, replaced: frozenset[int]) -> tuple[tuple[int, int], ...]:
    """The indexes of the units of some files, as half-open ranges."""
    numbers = _indexes(units)[np.isin(units.fields[:, 0], list(replaced))]
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs if len(run))
