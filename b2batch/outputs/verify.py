"""The proof of a finished output: every planned row in exactly one part, unchanged since it was committed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from b2batch.errors import IntegrityError
from b2batch.outputs.footer import check_footer, read_footer
from b2batch.outputs.layout import SUCCESS, part_name
from b2batch.outputs.parts import planned_row_ids
from b2batch.outputs.run import READ_THREADS, RunDirectory, planned_units
from b2batch.outputs.schema import find_own
from b2batch.outputs.success import Success
from b2batch.rows import UnitCounts, WorkUnit

RowsDigest = Callable[[WorkUnit], str]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read and everything found wrong, one line a problem; ``removed`` by ``repair``."""

    num_parts: int
    num_rows: int
    problems: tuple[str, ...]
    removed: tuple[str, ...] = ()

    @property
    def is_proved(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _PartFinding:
    name: str
    counts: UnitCounts
    problems: tuple[str, ...]


def verify(
    directory: RunDirectory,
    units: Sequence[WorkUnit],
    schema: pa.Schema,
    rows_digest: RowsDigest | None = None,
    *,
    repair: bool = False,
) -> VerifyReport:
    """Read every byte of the output and compare it with the plan, ``_SUCCESS`` and the input.

    Args:
        rows_digest: the ``footer.digest_rows`` of a unit, from the input as it is now; called from several
            threads. None: the input is not looked at.
        repair: take the lease, remove damaged parts, and ``_SUCCESS`` with them, so that the next run
            makes them again.

    Raises:
        RunLocked: ``repair``, and the run has a live driver.
    """
    planned = planned_units(units)
    there = directory.part_names()
    problems: list[str] = []
    try:
        success = directory.success()
    except IntegrityError as error:
        success, problems = None, [str(error)]
    if success is None and not problems:
        problems.append(f"{SUCCESS} is missing: the run is not finished")

    def examine(index: int) -> _PartFinding:
        return _examine_part(directory, there[index], planned[index], schema, success, rows_digest)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        findings = list(pool.map(examine, sorted(planned.keys() & there.keys())))
    problems += [problem for finding in findings for problem in finding.problems]
    missing = [part_name(index, directory.record.run8) for index in sorted(planned.keys() - there.keys())]
    unplanned = [there[index] for index in sorted(there.keys() - planned.keys())]
    problems += [f"{name}: missing" for name in missing]
    problems += [f"{name}: not in the plan" for name in unplanned]
    problems += _account_problems(directory, findings, success)
    bad = [finding.name for finding in findings if finding.problems] + unplanned
    removed = _repair(directory, bad, missing) if repair and problems else ()
    num_rows = sum(finding.counts.num_rows for finding in findings)
    return VerifyReport(len(findings), num_rows, tuple(problems), removed)


def _examine_part(
    directory: RunDirectory,
    name: str,
    unit: WorkUnit,
    schema: pa.Schema,
    success: Success | None,
    rows_digest: RowsDigest | None,
) -> _PartFinding:
    data = directory.store.read(name)
    problems = list(_digest_problems(name, data, success))
    try:
        footer = read_footer(data, name)
        check_footer(footer, directory.record.run_id, unit, name)
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        table.validate(full=True)
    except (IntegrityError, pa.ArrowException, OSError) as error:
        message = str(error).partition("\n")[0]
        problems.append(message if name in message else f"{name}: damaged: {message}")
        return _PartFinding(name, UnitCounts(), tuple(problems))
    problems += [f"{name}: {problem}" for problem in _table_problems(table, schema, unit, footer.counts)]
    if rows_digest is not None and rows_digest(unit) != footer.rows_digest:
        problems.append(f"{name}: its rows are not those of the input {footer.file.get('path', '')}")
    return _PartFinding(name, footer.counts, tuple(problems))


def _digest_problems(name: str, data: bytes, success: Success | None) -> Iterator[str]:
    if success is None:
        return
    listed = success.parts.get(name)
    if listed is None:
        yield f"{name}: not listed in {SUCCESS}"
    elif listed.sha256 != hashlib.sha256(data).hexdigest():
        yield f"{name}: sha256 is not the one in {SUCCESS}: changed since it was committed"


def _table_problems(table: pa.Table, schema: pa.Schema, unit: WorkUnit, counts: UnitCounts) -> Iterator[str]:
    if not table.schema.equals(schema):
        yield "its schema is not that of the job"
        return
    if table.column(find_own(schema, "row_id")).to_pylist() != planned_row_ids(unit):
        yield "its row_ids are not the planned ones in order"
    status = table.column(find_own(schema, "status"))
    is_ok, has_error = pc.equal(status, "ok"), table.column(find_own(schema, "error")).is_valid()
    if pc.sum(is_ok).as_py() not in (counts.num_ok, None) or pc.any(pc.equal(is_ok, has_error)).as_py():
        yield "status, error and the counts of its footer disagree"


def _account_problems(
    directory: RunDirectory, findings: Sequence[_PartFinding], success: Success | None
) -> Iterator[str]:
    if success is not None:
        total = sum((finding.counts for finding in findings), UnitCounts())
        if total != success.counts:
            yield f"{SUCCESS} counts {success.counts.num_rows} rows, the sound parts hold {total.num_rows}"
    for key in directory.foreign_files():
        yield f"{key}: not a file of this run"
    for key, _ in directory.store.list(f"{directory.keys.staging}/"):
        yield f"{key}: left behind by a writer that died"


def _repair(directory: RunDirectory, bad: Sequence[str], missing: Sequence[str]) -> tuple[str, ...]:
    """Remove bad parts, and ``_SUCCESS`` where a part is to be made again."""
    if not bad and not missing:
        return ()
    with directory.take_epoch() as epoch:
        directory.store.delete(SUCCESS)
        for name in bad:
            epoch.beat()
            directory.store.delete(name)
    return (SUCCESS, *bad)
