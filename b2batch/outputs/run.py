"""The directory of one run: opened by a driver, it is new, resumed, finished, or refused with a reason."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Self

from b2batch.errors import IntegrityError, OutputError, PlanOutdated, RunLocked
from b2batch.failpoints import failpoint
from b2batch.outputs.document import encode_document, read_document
from b2batch.outputs.drift import check_drift, diff_config, diff_values
from b2batch.outputs.footer import PartFooter, check_footer, read_part_footers
from b2batch.outputs.generation import (
    Extension,
    Generation,
    create_generation,
    erase_replaced,
    key_digest,
    latest_generation,
)
from b2batch.outputs.layout import META, PART_PREFIX, SUCCESS, RunKeys, parse_part_name
from b2batch.outputs.lease import Epoch, take_epoch
from b2batch.outputs.merge import complete_merge
from b2batch.outputs.parts import EMPTY_UNIT, find_part
from b2batch.outputs.record import RunRecord
from b2batch.outputs.store import Store
from b2batch.outputs.success import Success
from b2batch.rows import UnitCounts, UnitReport, WorkUnit

READ_THREADS = 8
_PROBED_READS = 64
_SHOWN_NAMES = 5
_log = logging.getLogger(__name__)


class RunDirectory:
    """One run in its output directory: which units are committed, who drives it, whether it is done."""

    def __init__(self, store: Store, record: RunRecord, generation: Generation) -> None:
        self.store = store
        self.record = record
        self.generation = generation
        self.keys = RunKeys(record.run8)

    @classmethod
    def open(
        cls,
        store: Store,
        record: RunRecord,
        plan: bytes,
        *,
        extension: Extension | None = None,
        overwrite: bool = False,
        takeover: bool = False,
        allow_foreign: bool = False,
    ) -> Self:
        """Start the run that ``record`` describes, or go on with it. A finished run is only read.

        An ``extension``, of an incremental run, makes ``plan`` the one that counts from now on; with
        ``takeover`` it does not wait for the lease of another driver to end.

        ``overwrite`` replaces another run, and does a finished one again; an unfinished run of the same
        identity is gone on with all the same, so that a crashed overwrite can be repeated. Files that
        belong to no run are never removed.

        Args:
            store: opened for ``record.run_id``.
            plan: the content of ``plan.parquet``, whose digest stands in ``record``.

        Raises:
            DriftError: the directory holds a run of another input or config; says what differs.
            OutputError: it cannot be written, or holds files of no run and ``allow_foreign`` is not set.
            RunLocked: the run to be replaced or extended has a live driver.
            PlanOutdated: an incremental run was begun or extended by another driver since it was planned.
        """
        current = latest_generation(store)
        if current is None:
            if not allow_foreign:
                _refuse_foreign(store)
            store.probe()
            _write_run(store, record, plan, extension)
            create_generation(store, _begun(Generation(1, record.run_id), record, extension))
            return cls.open(store, record, plan)  # another driver may have been first: its run decides
        is_same = current.run_id == record.run_id
        is_finished = _is_finished(store, current, may_be_damaged=overwrite)
        is_later = extension is not None and bool(extension.base_digest)
        if overwrite and (is_finished or not is_same) and not is_later:
            _replace(store, current, record, plan, extension)
            return cls.open(store, record, plan)
        if not is_same:
            found = _read_record(store, current)
            if extension is not None and not diff_config(found, record):
                raise PlanOutdated(f"{store.uri}: another driver began run {current.run8} meanwhile")
            check_drift(found, record, store.uri)
        if not is_finished:
            _resume(store, current, record, plan, extension)
        if extension is not None and is_later:
            _extend(store, record, plan, extension, takeover)
        return cls(store, record, latest_generation(store) or current)

    @classmethod
    def existing(cls, store: Store) -> Self:
        """The run that the directory holds, for reading; OutputError when it holds none."""
        current = latest_generation(store)
        if current is None:
            raise OutputError(f"{store.uri} holds no b2batch run")
        return cls(store, _read_record(store, current), current)

    def take_epoch(self, job_id: str = "", takeover: bool = False) -> Epoch:
        """Become this run's driver; see ``lease.take_epoch``."""
        return take_epoch(self.store, self.record.run8, job_id, takeover)

    @property
    def plan_digest(self) -> str:
        """The digest of the plan that counts."""
        return self.generation.plan_digest or self.record.plan_digest

    def read_plan(self) -> bytes:
        """The content of the plan that counts."""
        return self.store.read(_plan_key(self.generation))

    def read_keys(self) -> Iterator[bytes]:
        """What earlier plans of an incremental run stored as keys of their rows."""
        return (self.store.read(self.keys.row_keys(digest)) for digest in self.generation.key_digests)

    def success(self) -> Success | None:
        """What ``_SUCCESS`` says of this run, or None while it is not finished."""
        return read_success(self.store, self.generation)

    def signed(self) -> Success | None:
        """What ``_SUCCESS`` says of this run, be it of an earlier generation of it; None without one."""
        try:
            success = Success.from_document(read_document(self.store, SUCCESS))
        except (FileNotFoundError, IntegrityError):
            return None
        return success if success.run_id == self.record.run_id else None

    def part_names(self) -> dict[int, str]:
        """Unit index → name of each part of one unit of this run that is there, by one listing."""
        return {index: key for index, key in self._single_parts() if not self.generation.supersedes(index)}

    def superseded_names(self) -> list[str]:
        """The names of the parts of one unit whose rows were replaced by those of a later one."""
        return [key for index, key in self._single_parts() if self.generation.supersedes(index)]

    def _single_parts(self) -> Iterator[tuple[int, str]]:
        names = ((key, parse_part_name(key)) for key, _ in self.store.list(PART_PREFIX))
        return ((name.unit_index, key) for key, name in names if name and name.run8 == self.record.run8)

    def merged_names(self) -> list[str]:
        """The names of the parts that compactions made, in the order of their units."""
        if not self.generation.kept:
            return []
        names = ((parse_part_name(key), key) for key, _ in self.store.list(PART_PREFIX))
        return [
            key for name, key in sorted((n, k) for n, k in names if n) if name.run8 in self.generation.kept
        ]

    def num_committed(self) -> int:
        """How many units are committed, by the names of the parts and the footers of merged ones."""
        merged = (footer for name in self.merged_names() for footer in read_part_footers(self.store, name))
        held = {footer.unit_index for footer in merged if not self.generation.supersedes(footer.unit_index)}
        return len(held | self.part_names().keys())

    def committed_units(self, units: Sequence[WorkUnit]) -> dict[int, UnitCounts]:
        """What is committed of the planned ``units``: unit index → counts. Reads footers only.

        Raises:
            IntegrityError: a part is damaged or is not the planned unit's; names the part.
        """
        planned = planned_units(units)
        there = self.part_names()
        unplanned = sorted(name for index, name in there.items() if index not in planned)
        if unplanned:
            raise IntegrityError(f"{self.store.uri}: not in the plan of this run: {shown_names(unplanned)}")
        reports = _read_each(self._find_or_advise, [planned[index] for index in sorted(there)])
        counts = {report.unit_index: report.counts for report in reports}
        for name in self.merged_names():
            counts |= self._merged_units(name, planned)
        return counts

    def _merged_units(self, name: str, planned: Mapping[int, WorkUnit]) -> dict[int, UnitCounts]:
        try:
            footers = self.current(read_part_footers(self.store, name))
            for footer in footers:
                check_footer(footer, self.record.run_id, planned.get(footer.unit_index), name)
        except IntegrityError as error:
            raise _advised(error) from error
        return {footer.unit_index: footer.counts for footer in footers}

    def current(self, footers: Iterable[PartFooter]) -> list[PartFooter]:
        """Those of a merged part's footers whose rows were not replaced."""
        return [footer for footer in footers if not self.generation.supersedes(footer.unit_index)]

    def find_part(self, unit: WorkUnit) -> UnitReport | None:
        """The receipt of ``unit`` when it is committed, whoever committed it; else None.

        Raises:
            IntegrityError: what stands under its name is not its part.
        """
        try:
            return find_part(self.store, self.record.run_id, unit)
        except FileNotFoundError:
            return None

    def foreign_files(self) -> list[str]:
        """Files of no part of this run that whoever reads the directory as a dataset takes in."""
        return [key for key, _ in self.store.list("") if _is_visible(key) and not self._is_part(key)]

    def _is_part(self, key: str) -> bool:
        name = parse_part_name(key)
        return name is not None and self.generation.holds(name)

    def _find_or_advise(self, unit: WorkUnit) -> UnitReport:
        try:
            return find_part(self.store, self.record.run_id, unit)
        except IntegrityError as error:
            raise _advised(error) from error


def _advised(error: IntegrityError) -> IntegrityError:
    return IntegrityError(
        f"{error}. `b2batch verify --repair` removes it, so that the next run makes it again."
    )


def read_success(store: Store, generation: Generation) -> Success | None:
    """What ``_SUCCESS`` says of a generation's run, or None while it is not finished.

    One that a driver of a replaced run wrote late says nothing of this run.

    Raises:
        IntegrityError: it is damaged, or of a run that was never here.
    """
    if not generation.erased:
        return None
    try:
        success = Success.from_document(read_document(store, SUCCESS))
    except FileNotFoundError:
        return None
    if success.run_id == generation.run_id:
        return success if success.generation == generation.num_plans else None
    if success.run_id[:8] in generation.replaces:
        return None
    raise IntegrityError(
        f"{store.uri}/{SUCCESS} is of run {success.run_id[:8]}, not of {generation.run8}; "
        "`b2batch verify --repair` removes it"
    )


def _is_finished(store: Store, generation: Generation, may_be_damaged: bool) -> bool:
    try:
        return read_success(store, generation) is not None
    except IntegrityError:
        if may_be_damaged:  # it is going to be replaced
            return True
        raise


def _read_each(read: Callable[[WorkUnit], UnitReport], units: Sequence[WorkUnit]) -> list[UnitReport]:
    """``read`` of each unit, on threads where the storage is what one waits for.

    The first few tell. From a fast disk, threads would only wait for one another: half as fast.
    """
    wall_s, cpu_s = time.perf_counter(), time.thread_time()
    first = [read(unit) for unit in units[:_PROBED_READS]]
    wall_s, cpu_s = time.perf_counter() - wall_s, time.thread_time() - cpu_s
    rest = units[_PROBED_READS:]
    if wall_s < 2 * cpu_s:
        return first + [read(unit) for unit in rest]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [*first, *pool.map(read, rest)]


def planned_units(units: Sequence[WorkUnit]) -> Mapping[int, WorkUnit]:
    """The units that must each have a part, by index: for an empty plan one empty unit."""
    return {unit.index: unit for unit in units or (EMPTY_UNIT,)}


def shown_names(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more


def _is_visible(key: str) -> bool:
    """Whether readers of datasets (pyarrow, Spark, HF) look at ``key``."""
    return not any(name.startswith(("_", ".")) for name in key.split("/"))


def _refuse_foreign(store: Store) -> None:
    foreign = (key for key, _ in store.list("") if not key.startswith(f"{META}/"))
    names = list(itertools.islice(foreign, _SHOWN_NAMES))
    if names:
        raise OutputError(
            f"{store.uri} holds files but no b2batch run: {', '.join(names)}. Choose an empty directory, or "
            "--allow-foreign to write beside them; they are never removed."
        )


def _read_record(store: Store, generation: Generation) -> RunRecord:
    try:
        return RunRecord.from_document(read_document(store, RunKeys(generation.run8).record))
    except FileNotFoundError:
        raise IntegrityError(
            f"{store.uri} holds run {generation.run8}, but {RunKeys(generation.run8).record} is gone"
        ) from None


def _plan_key(generation: Generation) -> str:
    keys = RunKeys(generation.run8)
    return keys.plan if generation.num_plans == 1 else keys.later_plan(generation.plan_digest)


def _begun(generation: Generation, record: RunRecord, extension: Extension | None) -> Generation:
    """The generation with which a run begins."""
    return generation if extension is None else generation.planned(record.plan_digest, extension)


def _put_keys(store: Store, run8: str, extension: Extension | None) -> None:
    if extension is not None and extension.keys is not None:
        store.put_if_absent(RunKeys(run8).row_keys(key_digest(extension.keys)), extension.keys)


def _write_run(store: Store, record: RunRecord, plan: bytes, extension: Extension | None) -> None:
    """Write ``run.json`` and the plan unless they stand there; the generation that names them comes after."""
    keys = RunKeys(record.run8)
    failpoint("F1")
    if not store.put_if_absent(keys.record, encode_document(asdict(record))):
        found = RunRecord.from_document(read_document(store, keys.record))
        check_drift(found, record, f"{store.uri}/{keys.root}")
        for line in diff_values(found.provenance, record.provenance):
            _log.warning("this run was begun with another environment, bits may differ: %s", line)
    failpoint("F2")
    if extension is None or not extension.base_digest:
        store.put_if_absent(keys.plan, plan)
        _put_keys(store, record.run8, extension)


def _resume(
    store: Store, current: Generation, record: RunRecord, plan: bytes, extension: Extension | None
) -> None:
    store.probe()
    if current.num_plans == 1:
        _write_run(store, record, plan, extension)
    if current.is_merging:
        with take_epoch(store, current.run8) as epoch:
            finish_merge(store, epoch)
    elif not current.erased:
        with take_epoch(store, current.replaces[-1]) as epoch:
            _erase(store, epoch)


def finish_merge(store: Store, epoch: Epoch) -> None:
    """Complete a compaction that was cut short, under its run's lease; nothing to do where there is none."""
    generation = latest_generation(store)  # read again under the lease: it may be done by now
    if generation is not None and generation.is_merging:
        complete_merge(store, generation, epoch.beat)


def _extend(store: Store, record: RunRecord, plan: bytes, extension: Extension, takeover: bool) -> None:
    """Make ``plan`` the one that counts, under the run's lease. ``_SUCCESS`` stays: it is of the rows before.

    Nothing is seen of a plan until the generation names it: whoever is cut short before has changed nothing.
    """
    store.probe()
    with take_epoch(store, record.run8, takeover=takeover):
        current = latest_generation(store)  # read again under the lease: others may have been here
        if current is None or current.run_id != record.run_id:
            raise PlanOutdated(f"{store.uri}: run {record.run8} was replaced meanwhile")
        if current.plan_digest != extension.base_digest or not current.erased:
            raise PlanOutdated(f"{store.uri}: run {record.run8} was changed by another command meanwhile")
        extended = current.extended(record.plan_digest, extension)
        store.put_if_absent(_plan_key(extended), plan)
        _put_keys(store, record.run8, extension)
        if not create_generation(store, extended):
            raise PlanOutdated(f"{store.uri}: run {record.run8} is being changed by another command")


def _replace(
    store: Store, current: Generation, record: RunRecord, plan: bytes, extension: Extension | None
) -> None:
    """Put ``record`` in the place of the current run, under that run's own lease: nobody else works on it."""
    store.probe()
    with take_epoch(store, current.run8) as epoch:
        _write_run(store, record, plan, extension)
        if not create_generation(store, _begun(current.successor(record.run_id), record, extension)):
            raise RunLocked(f"{store.uri}: another driver is replacing run {current.run8}")
        _erase(store, epoch)


def _erase(store: Store, epoch: Epoch) -> None:
    generation = latest_generation(store)  # read again under the lease: it may be done by now
    if generation is not None:
        erase_replaced(store, generation, epoch.beat)
