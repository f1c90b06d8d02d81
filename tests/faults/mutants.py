"""Planted bugs: commits as one might write them. The harness must turn red on each, or it proves nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from b2batch import failpoints
from b2batch.outputs import parts, run
from b2batch.outputs.footer import read_part_footer
from b2batch.outputs.layout import META, part_name
from b2batch.outputs.parts import Part
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import LocalStore, Store
from b2batch.rows import UnitCounts, UnitReport, WorkUnit


def _write_visibly(store: Store, key: str, data: bytes) -> None:
    """Under its own name and over whatever stands there, as a plain open() does."""
    if isinstance(store, LocalStore):
        Path(store.uri, key).write_bytes(data)
    else:
        store.put(key, data)


# --- write in place: the name is there before the data is whole ----------------------------------


def commit_in_place(store: Store, part: Part) -> UnitReport:
    _write_visibly(store, part.name, part.data[: len(part.data) // 2])
    failpoints.failpoint("F7")
    _write_visibly(store, part.name, part.data)
    return UnitReport(part.unit.index, part.attempt, part.counts)


# --- marker before data: a unit counts as done before its rows are there -------------------------


def _marker(run_id: str, unit_index: int) -> str:
    return f"{META}/{run_id[:8]}/done/{unit_index:06d}"


def commit_marker_first(store: Store, part: Part) -> UnitReport:
    counts = json.dumps(asdict(part.counts)).encode()
    is_new = store.put_if_absent(_marker(part.run_id, part.unit.index), counts)
    if is_new:
        store.put_if_absent(part.name, part.data)
    return UnitReport(part.unit.index, part.attempt, part.counts, newly_committed=is_new)


def find_marker(store: Store, run_id: str, unit: WorkUnit) -> UnitReport:
    counts = UnitCounts(**json.loads(store.read(_marker(run_id, unit.index))))
    return UnitReport(unit.index, 0, counts, newly_committed=False)


def marked_parts(directory: RunDirectory) -> dict[int, str]:
    prefix = f"{META}/{directory.record.run8}/done/"
    units = [int(key.removeprefix(prefix)) for key, _ in directory.store.list(prefix)]
    return {index: part_name(index, directory.record.run8) for index in units}


# --- a name for each attempt: nobody is refused --------------------------------------------------


def _own_name(part: Part) -> str:
    stem = part_name(part.unit.index, part.run_id[:8]).removesuffix(".parquet")
    return f"{stem}-{hashlib.sha256(part.data).hexdigest()[:8]}.parquet"


def commit_under_own_name(store: Store, part: Part) -> UnitReport:
    store.put_if_absent(_own_name(part), part.data)
    return UnitReport(part.unit.index, part.attempt, part.counts)


def find_any_attempt(store: Store, run_id: str, unit: WorkUnit) -> UnitReport:
    stem = part_name(unit.index, run_id[:8]).removesuffix(".parquet")
    for name, _ in store.list(stem):
        return UnitReport(unit.index, 0, read_part_footer(store, name).counts, newly_committed=False)
    raise FileNotFoundError(stem)


def parts_of_any_attempt(directory: RunDirectory) -> dict[int, str]:
    names = [key for key, _ in directory.store.list("part-") if f"-{directory.record.run8}" in key]
    return {int(name.split("-")[1]): name for name in names}


# --- planting ------------------------------------------------------------------------------------

Commit = Callable[[Store, Part], UnitReport]
Find = Callable[[Store, str, WorkUnit], UnitReport]
PartNames = Callable[[RunDirectory], dict[int, str]]

MUTANTS: dict[str, tuple[Commit, Find, PartNames]] = {
    "write in place": (commit_in_place, parts.find_part, RunDirectory.part_names),
    "marker before data": (commit_marker_first, find_marker, marked_parts),
    "attempt-unique names": (commit_under_own_name, find_any_attempt, parts_of_any_attempt),
}


@contextlib.contextmanager
def planted(mutant: str) -> Iterator[None]:
    """The package with this bug in it; with ``""`` as it is."""
    if not mutant:
        yield
        return
    commit, find, part_names = MUTANTS[mutant]
    with contextlib.ExitStack() as stack:
        for module in _committers():
            stack.enter_context(mock.patch.object(module, "commit_part", commit))
        for module in (parts, run):
            stack.enter_context(mock.patch.object(module, "find_part", find))
        stack.enter_context(mock.patch.object(RunDirectory, "part_names", part_names))
        yield


def _committers() -> list[object]:
    """Every loaded module that holds ``commit_part`` under that name."""
    return [
        module
        for name, module in list(sys.modules.items())
        if (name.startswith("b2batch") or name.endswith("tiny_run"))
        and getattr(module, "commit_part", None) is parts.commit_part
    ]
