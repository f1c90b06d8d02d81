"""The proof of a finished output: every planned row in exactly one part, unchanged since it was committed."""

from __future__ import annotations

import errno
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from b2batch.errors import IntegrityError, StorageError
from b2batch.outputs.footer import PartFooter, check_footer, read_footers
from b2batch.outputs.layout import QUARANTINE, SUCCESS, parse_part_name, part_name
from b2batch.outputs.merge import trim_part
from b2batch.outputs.parts import planned_row_ids
from b2batch.outputs.run import READ_THREADS, RunDirectory, planned_units
from b2batch.outputs.schema import find_own
from b2batch.outputs.success import Success
from b2batch.parquet_bytes import read_parquet
from b2batch.rows import UnitCounts, WorkUnit

RowsDigest = Callable[[WorkUnit], str]
_CUT_SHORT = "a compaction was cut short: `b2batch compact` or the next run completes it"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read and everything found wrong, one line a problem.

    ``removed`` by ``repair``, ``set_aside`` by ``quarantine``. ``foreign`` are files of nobody's run that
    whoever reads the directory as a dataset meets: not a fault of the run, but worth knowing.
    """

    num_parts: int
    num_rows: int
    problems: tuple[str, ...]
    removed: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    set_aside: tuple[str, ...] = ()

    @property
    def is_proved(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _PartFinding:
    name: str
    footers: tuple[PartFooter, ...]
    problems: tuple[str, ...]

    @property
    def counts(self) -> UnitCounts:
        return sum((footer.counts for footer in self.footers), UnitCounts())


def verify(
    directory: RunDirectory,
    units: Sequence[WorkUnit],
    schema: pa.Schema,
    rows_digest: RowsDigest | None = None,
    *,
    repair: bool = False,
    quarantine: bool = False,
) -> VerifyReport:
    """Read every byte of the output and compare it with the plan, ``_SUCCESS`` and the input.

    Args:
        rows_digest: the ``footer.digest_rows`` of a unit, from the input as it is now; called from several
            threads. None: the input is not looked at.
        repair: take the lease, remove damaged parts, and ``_SUCCESS`` with them, so that the next run
            makes them again.
        quarantine: take the lease, and move parts of no run of this directory under ``__b2batch``.

    Raises:
        RunLocked: ``repair`` or ``quarantine``, and the run has a live driver.
        StorageError: the output cannot be reached.
    """
    planned = planned_units(units)
    success, problems = _read_success(directory)

    def examine(name: str) -> _PartFinding:
        return _examine_part(directory, name, planned, schema, success, rows_digest)

    names = [*directory.merged_names(), *(name for _, name in sorted(directory.part_names().items()))]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        findings = list(pool.map(examine, names))
    problems += [problem for finding in findings for problem in finding.problems]
    held = Counter(footer.unit_index for finding in findings for footer in finding.footers)
    missing = _missing(directory, planned, held, names)
    late = _late_copies(directory, held)
    superseded = directory.superseded_names() if success is not None else []
    foreign = directory.foreign_files()
    strays = [key for key in foreign if parse_part_name(key)]
    problems += [f"{name}: missing" for name in missing]
    problems += [f"{name}: its rows stand in a merged part too" for name in late]
    problems += [f"{name}: its rows were replaced by those of a later generation" for name in superseded]
    problems += _account_problems(directory, findings, success, strays)
    bad = {finding.name for finding in findings if finding.problems}.union(late, superseded)
    is_broken = bool(bad or missing) or (success is None and _is_damaged(directory))
    return VerifyReport(
        num_parts=len(findings),
        num_rows=sum(finding.counts.num_rows for finding in findings),
        problems=tuple(problems),
        removed=_repair(directory, sorted(bad)) if repair and is_broken else (),
        foreign=tuple(key for key in foreign if key not in strays),
        set_aside=_set_aside(directory, strays) if quarantine and strays else (),
    )


def _read_success(directory: RunDirectory) -> tuple[Success | None, list[str]]:
    """What ``_SUCCESS`` says, and what is wrong with it."""
    if directory.generation.is_merging:
        return None, [_CUT_SHORT]
    signed = directory.signed()
    if signed is not None and signed.generation < directory.generation.num_plans:
        newest = directory.generation.num_plans
        return None, [f"generation {newest} is not finished; {SUCCESS} is of the {signed.generation} before"]
    try:
        success = directory.success()
    except IntegrityError as error:
        return None, [str(error)]
    return success, [] if success else [f"{SUCCESS} is missing: the run is not finished"]


def _is_damaged(directory: RunDirectory) -> bool:
    """Whether ``_SUCCESS`` is there and not this run's, of whatever generation."""
    return directory.signed() is None and directory.store.exists(SUCCESS)


def _examine_part(
    directory: RunDirectory,
    name: str,
    planned: Mapping[int, WorkUnit],
    schema: pa.Schema,
    success: Success | None,
    rows_digest: RowsDigest | None,
) -> _PartFinding:
    try:
        data = directory.store.read(name)
        written = read_footers(data, name)
        footers = tuple(directory.current(written))
        if not footers:
            return _PartFinding(name, (), ())
        if len(footers) < len(written):  # what was replaced is not taken out yet: the rest is examined
            data = trim_part(data, written, footers, name)
        units = [_planned_unit(directory, footer, planned, name) for footer in footers]
        table = read_parquet(data)
        table.validate(full=True)
    except FileNotFoundError:
        return _PartFinding(name, (), (f"{name}: it went away meanwhile",))
    except (IntegrityError, pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError) and error.errno != errno.EIO:
            raise  # a store that cannot be reached says nothing of the part; a bad sector does
        message = str(error).partition("\n")[0]
        return _PartFinding(name, (), (message if name in message else f"{name}: damaged: {message}",))
    problems = list(_digest_problems(name, data, success))
    problems += [f"{name}: {problem}" for problem in _table_problems(table, schema, units, footers)]
    if rows_digest is not None:
        changed = [
            footer
            for footer, unit in zip(footers, units, strict=True)
            if rows_digest(unit) != footer.rows_digest
        ]
        problems += [f"{name}: its rows are not those of the input {path}" for path in _paths(changed)]
    return _PartFinding(name, footers, tuple(problems))


def _planned_unit(
    directory: RunDirectory, footer: PartFooter, planned: Mapping[int, WorkUnit], name: str
) -> WorkUnit:
    """The unit that a footer is of; a part of one unit must be of the one that it is named after."""
    parsed = parse_part_name(name)
    is_single = parsed is not None and parsed.run8 == directory.record.run8
    unit = planned.get(parsed.unit_index if parsed and is_single else footer.unit_index)
    check_footer(footer, directory.record.run_id, unit, name)
    assert unit is not None  # else check_footer had raised
    return unit


def _digest_problems(name: str, data: bytes, success: Success | None) -> Iterator[str]:
    if success is None:
        return
    listed = success.parts.get(name)
    if listed is None:
        yield f"{name}: not listed in {SUCCESS}"
    elif listed.sha256 != hashlib.sha256(data).hexdigest():
        yield f"{name}: sha256 is not the one in {SUCCESS}: changed since it was committed"


def _table_problems(
    table: pa.Table, schema: pa.Schema, units: Sequence[WorkUnit], footers: Sequence[PartFooter]
) -> Iterator[str]:
    if not table.schema.equals(schema):
        yield "its schema is not that of the job"
        return
    row_ids = [row_id for unit in units for row_id in planned_row_ids(unit)]
    if table.column(find_own(schema, "row_id")).to_pylist() != row_ids:
        yield "its row_ids are not the planned ones in order"
        return
    first = 0
    for footer in footers:
        if not _has_counts(table.slice(first, footer.num_rows), schema, footer.counts):
            yield "status, error and the counts of its footer disagree"
        first += footer.num_rows


def _has_counts(rows: pa.Table, schema: pa.Schema, counts: UnitCounts) -> bool:
    is_ok = pc.equal(rows.column(find_own(schema, "status")), "ok")
    has_error = rows.column(find_own(schema, "error")).is_valid()
    is_contradictory = pc.any(pc.equal(is_ok, has_error)).as_py()
    return pc.sum(is_ok).as_py() in (counts.num_ok, None) and not is_contradictory


def _paths(footers: Iterable[PartFooter]) -> list[str]:
    return sorted({str(footer.file.get("path", "")) for footer in footers})


def _missing(
    directory: RunDirectory, planned: Mapping[int, WorkUnit], held: Mapping[int, int], names: Iterable[str]
) -> list[str]:
    """The parts of units that no sound part holds, but for those that are there and damaged."""
    missing = [part_name(index, directory.record.run8) for index in sorted(planned.keys() - held.keys())]
    there = set(names)
    return [name for name in missing if name not in there]


def _late_copies(directory: RunDirectory, held: Mapping[int, int]) -> list[str]:
    """Parts of one unit that a merged part holds too, committed by somebody who was away meanwhile."""
    if directory.generation.is_merging:
        return []
    return [name for index, name in directory.part_names().items() if held.get(index, 0) > 1]


def _account_problems(
    directory: RunDirectory,
    findings: Sequence[_PartFinding],
    success: Success | None,
    strays: Sequence[str],
) -> Iterator[str]:
    if success is not None:
        total = sum((finding.counts for finding in findings), UnitCounts())
        if total != success.counts:
            yield f"{SUCCESS} counts {success.counts.num_rows} rows, the sound parts hold {total.num_rows}"
    for key in strays:
        yield f"{key}: not a part of this run, but whoever reads the directory takes it in"
    for key, _ in directory.store.list(f"{directory.keys.staging}/"):
        yield f"{key}: left behind by a writer that died"


def _repair(directory: RunDirectory, bad: Sequence[str]) -> tuple[str, ...]:
    """Remove bad parts, and ``_SUCCESS``, so that the next run makes what is missing again."""
    if directory.generation.is_merging:
        return ()
    directory.store.probe()
    with directory.take_epoch() as epoch:
        directory.store.delete(SUCCESS)
        for name in bad:
            epoch.beat()
            directory.store.delete(name)
    return (SUCCESS, *bad)


def _set_aside(directory: RunDirectory, strays: Sequence[str]) -> tuple[str, ...]:
    """Move parts of other runs to where no reader of the directory looks, each under its content's name."""
    store = directory.store
    store.probe()
    with directory.take_epoch() as epoch:
        for key in strays:
            data = store.read(key)
            epoch.beat()
            store.put_if_absent(f"{QUARANTINE}/{hashlib.sha256(data).hexdigest()[:8]}-{key}", data)
            store.delete(key)
    return tuple(strays)
