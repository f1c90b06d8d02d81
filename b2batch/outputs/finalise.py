"""From all parts to ``_SUCCESS``. A function of the parts alone, so that any crash within is done over."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import Fenced, IntegrityError
from b2batch.failpoints import failpoint
from b2batch.outputs.document import encode_document
from b2batch.outputs.footer import PartFooter, check_footer, read_footers, read_part_footers
from b2batch.outputs.generation import latest_generation, parts_of
from b2batch.outputs.layout import SUCCESS, part_name
from b2batch.outputs.merge import trim_part
from b2batch.outputs.parts import PartOrigin, commit_part, encode_part
from b2batch.outputs.run import READ_THREADS, RunDirectory, planned_units, shown_names
from b2batch.outputs.schema import find_own
from b2batch.outputs.store import Store
from b2batch.outputs.success import PartDigest, Success, allowed_errors, check_budget
from b2batch.parquet_bytes import read_parquet
from b2batch.rows import UnitCounts, WorkUnit

MAX_LISTED_ERRORS = 10_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _PartAccount:
    name: str
    sha256: str
    footers: tuple[PartFooter, ...]

    @property
    def counts(self) -> UnitCounts:
        return sum((footer.counts for footer in self.footers), UnitCounts())


def finalise(
    directory: RunDirectory,
    units: Sequence[WorkUnit],
    schema: pa.Schema,
    *,
    num_skipped_blank: int,
    max_error_rate: float,
    first_unit: int = 0,
) -> Success:
    """Check that every planned row stands in a part, then write the error list and ``_SUCCESS``.

    Parts that late writers of a replaced run left are removed; other foreign files are reported, never
    counted. A finished run may be finalised again: ``partial`` then follows today's ``max_error_rate``.
    Of a run that grew, only the units from ``first_unit`` on are held against that: a failed generation
    is told once. Parts that ``_SUCCESS`` signed for earlier generations are not read again.

    Raises:
        IntegrityError: a unit has no part, a part is not its unit's, or rows in and out differ.
        ErrorBudgetExceeded: everything is written, but more rows failed than are allowed.
        Fenced: the run was replaced meanwhile.
    """
    failpoint("F10")
    if not units:
        _commit_empty_part(directory, schema)
    remove_superseded(directory)
    _set_foreign_aside(directory)
    accounts = _account_for(directory, units)
    counts = sum((account.counts for account in accounts), UnitCounts())
    num_planned = sum(unit.num_rows for unit in units)
    if counts.num_rows != num_planned:
        raise IntegrityError(f"{num_planned} rows were planned, {counts.num_rows} stand in the parts")
    budgeted = sum(
        (f.counts for account in accounts for f in account.footers if f.unit_index >= first_unit),
        UnitCounts(),
    )
    failpoint("F11")
    errors = b"".join(islice(_error_lines(directory.store, accounts), MAX_LISTED_ERRORS))
    directory.store.put(directory.keys.errors, errors)
    success = Success(
        run_id=directory.record.run_id,
        counts=counts,
        num_skipped_blank=num_skipped_blank,
        partial=budgeted.num_error > allowed_errors(budgeted.num_rows, max_error_rate),
        parts={account.name: PartDigest(account.sha256, account.counts.num_rows) for account in accounts},
        generation=directory.generation.num_plans,
    )
    _remove_staged(directory)
    failpoint("F12")
    _write_success(directory, success)
    failpoint("F13")
    check_budget(budgeted, max_error_rate)
    return success


def remove_superseded(directory: RunDirectory) -> None:
    """Take away the rows that those of a later generation replace, once these are committed.

    ``_SUCCESS`` lists the old parts, so it goes first. A merged part with other rows too is written anew
    without them before it goes: at every moment each row that counts stands in a part.
    """
    store = directory.store
    mixed = {name: read_part_footers(store, name) for name in directory.merged_names()}
    mixed = {
        name: footers for name, footers in mixed.items() if len(directory.current(footers)) < len(footers)
    }
    single = directory.superseded_names()
    if mixed or single:
        store.delete(SUCCESS)
    for name, footers in mixed.items():
        kept = directory.current(footers)
        if kept:
            trimmed = part_name(kept[0].unit_index, directory.generation.kept[-1])
            store.put_if_absent(trimmed, trim_part(store.read(name), footers, kept, name))
        store.delete(name)
    for name in single:
        store.delete(name)


def _commit_empty_part(directory: RunDirectory, schema: pa.Schema) -> None:
    """An input without rows still gives an output with a schema."""
    (unit,) = planned_units(()).values()
    origin = PartOrigin(
        run_id=directory.record.run_id,
        file={},
        epoch=0,
        attempt=1,
        worker_id="driver",
        provenance=directory.record.provenance,
    )
    commit_part(directory.store, encode_part(unit, (), schema.empty_table(), (), schema, origin))


def _set_foreign_aside(directory: RunDirectory) -> None:
    replaced = tuple(run8 for run8 in directory.generation.replaces if run8 != directory.record.run8)
    for name in parts_of(directory.store, replaced):
        directory.store.delete(name)
    foreign = directory.foreign_files()
    if foreign:
        _log.warning("%s holds files that are not of this run: %s", directory.store.uri, shown_names(foreign))


def _account_for(directory: RunDirectory, units: Sequence[WorkUnit]) -> list[_PartAccount]:
    """What each part holds, in unit order; IntegrityError unless each planned unit stands in one part."""
    planned = planned_units(units)
    signed = _signed_before(directory)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        merged = [
            *pool.map(lambda name: _account(directory, name, planned, signed), directory.merged_names())
        ]
        held = {footer.unit_index for account in merged for footer in account.footers}
        there = _without_late_copies(directory, held)
        missing = [part_name(i, directory.record.run8) for i in sorted(planned.keys() - there.keys() - held)]
        if missing:
            raise IntegrityError(f"{directory.store.uri}: not committed: {shown_names(missing)}")
        unplanned = [there[index] for index in sorted(there.keys() - planned.keys())]
        if unplanned:
            raise IntegrityError(
                f"{directory.store.uri}: not in the plan of this run: {shown_names(unplanned)}"
            )
        single = pool.map(
            lambda index: _account(directory, there[index], {index: planned[index]}, signed), there
        )
        return sorted([*merged, *single], key=lambda account: account.footers[0].unit_index)


def _signed_before(directory: RunDirectory) -> Mapping[str, PartDigest]:
    """The parts that were read and signed when an earlier generation was finished."""
    success = directory.signed()
    return {} if success is None or success.generation == directory.generation.num_plans else success.parts


def _account(
    directory: RunDirectory, name: str, planned: Mapping[int, WorkUnit], signed: Mapping[str, PartDigest]
) -> _PartAccount:
    """What a part holds, every page of it read against its checksum unless that was done before."""
    data = b"" if name in signed else directory.store.read(name)
    footers = read_footers(data, name) if data else read_part_footers(directory.store, name)
    for footer in footers:
        check_footer(footer, directory.record.run_id, planned.get(footer.unit_index), name)
    if not data:
        return _PartAccount(name, signed[name].sha256, footers)
    check_pages(data, name)
    return _PartAccount(name, hashlib.sha256(data).hexdigest(), footers)


def check_pages(data: bytes, name: str) -> None:
    """Read all of a part; IntegrityError where a page does not have its checksum."""
    try:
        read_parquet(data)
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{name} is damaged: {error}") from error


def _without_late_copies(directory: RunDirectory, held: Set[int]) -> dict[int, str]:
    """The parts of one unit, less those a late writer made of units that were merged meanwhile."""
    there = directory.part_names()
    for index in there.keys() & held:
        directory.store.delete(there.pop(index))
    return there


def _error_lines(store: Store, accounts: Sequence[_PartAccount]) -> Iterator[bytes]:
    for account in accounts:
        if account.counts.num_error:
            for error in read_errors(store, account.name):
                yield json.dumps(error, ensure_ascii=False).encode() + b"\n"


def read_errors(store: Store, name: str) -> Iterator[Mapping[str, Any]]:
    """The failed rows of a part: row_id, input file, and the fields of their ``error``."""
    with store.open(name) as file:
        paths = {str(footer.file_index): footer.file.get("path") for footer in read_footers(file, name)}
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        row_id, error = (find_own(parquet.schema_arrow, column) for column in ("row_id", "error"))
        table = parquet.read(columns=[row_id, error], use_threads=False)  # see read_parquet
    for row in table.filter(table.column(error).is_valid()).to_pylist():
        yield {"row_id": row[row_id], "file": paths[row[row_id].partition(":")[0]], **row[error]}


def _remove_staged(directory: RunDirectory) -> None:
    """All units are committed: whoever still stages something has lost its race."""
    for key, _ in list(directory.store.list(f"{directory.keys.staging}/")):
        directory.store.delete(key)


def _write_success(directory: RunDirectory, success: Success) -> None:
    document = encode_document(success.to_document())
    current = latest_generation(directory.store)
    if current is None or current.run_id != directory.record.run_id:
        raise Fenced(f"{directory.store.uri}: run {directory.record.run8} was replaced by another one")
    if current.num_plans != directory.generation.num_plans:
        raise Fenced(f"{directory.store.uri}: run {directory.record.run8} was extended by another driver")
    if directory.store.put_if_absent(SUCCESS, document):
        return
    found = directory.success()
    if found is None:  # of a replaced run, by a driver that was away: not ours, and of nobody any more
        directory.store.put(SUCCESS, document)
        return
    if found.parts != success.parts:
        raise IntegrityError(f"{directory.store.uri}: the parts are not those that {SUCCESS} lists")
    if found != success:  # the error budget was changed
        directory.store.put(SUCCESS, document)
