"""A run that grows: what an extension adds and replaces; no crash at any of its writes loses rows."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from b2batch.errors import ErrorBudgetExceeded, Fenced, IntegrityError, PlanOutdated, RunLocked
from b2batch.outputs.finalise import finalise
from b2batch.outputs.garbage import collect_garbage
from b2batch.outputs.generation import Extension, GenerationKind, latest_generation
from b2batch.outputs.layout import SUCCESS, part_name
from b2batch.outputs.merge import begin_merge, complete_merge, plan_merge
from b2batch.outputs.overview import overview
from b2batch.outputs.parts import commit_part
from b2batch.outputs.record import RunRecord
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.outputs.success import Success
from b2batch.outputs.verify import verify
from b2batch.rows import WorkUnit

from .memory_store import CrashError, CrashingStore, MemoryStore
from .tiny_run import INPUT_SCHEMA, PLAN, drive, make_part, make_record, make_spec, make_units, rows_digest

SPEC = make_spec("input.incremental=true")
SCHEMA = output_schema(INPUT_SCHEMA, SPEC)
FIRST = make_units(4)  # of one file
RECORD = make_record(SPEC, FIRST)
BEGIN = Extension("", keys=b"first keys", tick="2026-11-01T00:00:00+00:00")
NOW = datetime(2026, 11, 23, tzinfo=UTC)
# A second file, and a third one in place of a part of the first.
ADDED = [WorkUnit(4, 1, 0, 3, 0, 3), WorkUnit(5, 2, 0, 2, 0, 2)]
GROWN = [*FIRST, *ADDED]
REPLACED = [unit for unit in GROWN if unit.index not in (1, 2)]


def grown(units: Sequence[WorkUnit]) -> RunRecord:
    return replace(make_record(SPEC, units), run_id=RECORD.run_id)


def extension(base: RunRecord = RECORD, superseded: tuple[tuple[int, int], ...] = ()) -> Extension:
    return Extension(base.plan_digest, superseded, b"second keys", "2026-11-02T00:00:00+00:00")


def begin(store: MemoryStore) -> Success:
    return drive(store, SPEC, FIRST, record=RECORD, extension=BEGIN)[1]


def extend(
    store: MemoryStore, units: Sequence[WorkUnit], *superseded: tuple[int, int]
) -> tuple[int, Success]:
    """Extend, or go on where that was done: as a caller plans it, who looks at what is there."""
    generation = latest_generation(store)
    assert generation is not None
    is_done = generation.plan_digest == grown(units).plan_digest
    more = None if is_done else extension(superseded=superseded)
    return drive(store, SPEC, units, record=grown(units), extension=more)


def compact(store: MemoryStore, units: Sequence[WorkUnit]) -> None:
    directory = RunDirectory.existing(store)
    success = directory.success()
    assert success is not None
    merge = plan_merge(store, success, 1 << 30)
    assert merge is not None
    begin_merge(store, directory.generation, merge)
    complete_merge(store, RunDirectory.existing(store).generation, lambda: None)
    finalise(RunDirectory.existing(store), units, SCHEMA, num_skipped_blank=0, max_error_rate=1.0)


def rows(store: MemoryStore) -> Counter[str]:
    names = [key for key, _ in store.list("part-")]
    tables = [pq.read_table(pa.BufferReader(store.read(name)), columns=["row_id"]) for name in names]
    return Counter(row_id for table in tables for row_id in table["row_id"].to_pylist())


def ids(units: Sequence[WorkUnit]) -> Counter[str]:
    return Counter(f"{unit.file_index}:{unit.first_row + i}" for unit in units for i in range(unit.num_rows))


def prove(store: MemoryStore, units: Sequence[WorkUnit]) -> None:
    assert rows(store) == ids(units)
    report = verify(RunDirectory.existing(store), units, SCHEMA, rows_digest)
    assert report.problems == ()
    assert report.num_rows == sum(unit.num_rows for unit in units)


def test_new_units_are_added_and_the_others_left(memory: MemoryStore) -> None:
    begin(memory)
    before = {key: memory.read(key) for key, _ in memory.list("part-")}
    num_generated, success = extend(memory, GROWN)
    assert num_generated == 2
    assert success.generation == 2
    assert success.counts.num_rows == 17
    assert before.items() <= memory.objects.items()
    prove(memory, GROWN)
    assert extend(memory, GROWN)[0] == 0
    view = overview(memory, NOW)
    assert (view.generation, view.tick[:10], view.counts.num_rows) == (2, "2026-11-02", 17)


def test_while_it_grows_success_is_of_the_rows_before(memory: MemoryStore) -> None:
    first = begin(memory)
    directory = RunDirectory.open(memory, grown(GROWN), PLAN, extension=extension())
    assert directory.success() is None
    assert directory.signed() == first
    assert directory.committed_units(GROWN).keys() == {0, 1, 2, 3}
    assert "generation 2 was begun" in overview(memory, NOW).reason or overview(memory, NOW).state is None
    (problem, *missing) = verify(directory, GROWN, SCHEMA).problems
    assert problem == "generation 2 is not finished; _SUCCESS is of the 1 before"
    assert [name[:11] for name in missing] == ["part-000004", "part-000005"]
    verify(directory, GROWN, SCHEMA, repair=True)
    assert directory.signed() == first or rows(memory) == ids(FIRST)


def test_replaced_rows_stay_until_those_in_their_place_are_committed(memory: MemoryStore) -> None:
    begin(memory)
    directory = RunDirectory.open(memory, grown(REPLACED), PLAN, extension=extension(superseded=((1, 3),)))
    assert rows(memory) == ids(FIRST)
    assert directory.part_names().keys() == {0, 3}
    commit_part(memory, make_part(ADDED[0], RECORD.run_id, spec=SPEC))
    assert rows(memory) == ids([*FIRST, ADDED[0]])
    num_generated, _ = extend(memory, REPLACED)
    assert num_generated == 1
    prove(memory, REPLACED)


def test_merged_parts_lose_their_replaced_rows_alone(memory: MemoryStore) -> None:
    begin(memory)
    compact(memory, FIRST)
    merged = RunDirectory.existing(memory).merged_names()
    extend(memory, REPLACED, (1, 3))
    prove(memory, REPLACED)
    assert not memory.exists(merged[0])
    compact(memory, REPLACED)
    prove(memory, REPLACED)
    assert len([key for key, _ in memory.list("part-")]) == 1


@pytest.mark.parametrize("is_compact", [False, True], ids=["single parts", "a merged part"])
@pytest.mark.parametrize("units", [GROWN, REPLACED], ids=["added", "replaced"])
def test_an_extension_that_crashes_anywhere_is_gone_on_with(units: list[WorkUnit], is_compact: bool) -> None:
    superseded = [(1, 3)] if units is REPLACED else []
    kept = ids([unit for unit in units if unit in FIRST])
    for num_steps in range(200):
        store = MemoryStore()
        begin(store)
        if is_compact:
            compact(store, FIRST)
        try:
            extend(CrashingStore(store, num_steps), units, *superseded)
        except CrashError:
            store.now_s += 3600  # the lease of the dead driver
        else:
            break
        there = rows(store)
        assert kept <= there | kept
        assert not kept - there, "rows that count are always there"
        if ids(FIRST) - there:
            assert not ids(units) - there, "replaced rows go only once those in their place are all there"
        signed = RunDirectory.existing(store).signed()
        for name, part in signed.parts.items() if signed else ():
            assert hashlib.sha256(store.read(name)).hexdigest() == part.sha256
        extend(store, units, *superseded)
        prove(store, units)
    else:
        pytest.fail("it never got through")
    assert num_steps > 12


def test_what_is_late_of_replaced_units_is_found_and_removed(memory: MemoryStore) -> None:
    begin(memory)
    extend(memory, REPLACED, (1, 3))
    late = part_name(2, RECORD.run8)
    memory.put(late, make_part(FIRST[2], RECORD.run_id, spec=SPEC).data)
    directory = RunDirectory.existing(memory)
    report = verify(directory, REPLACED, SCHEMA, repair=True)
    assert report.problems == (f"{late}: its rows were replaced by those of a later generation",)
    extend(memory, REPLACED)
    prove(memory, REPLACED)


def test_the_run_is_extended_by_one_of_two(memory: MemoryStore) -> None:
    begin(memory)
    extend(memory, GROWN)
    other = [*FIRST, ADDED[1]]
    with pytest.raises(PlanOutdated):
        RunDirectory.open(memory, grown(other), PLAN, extension=extension())
    prove(memory, GROWN)


def test_nobody_extends_under_a_live_driver(memory: MemoryStore) -> None:
    begin(memory)
    with RunDirectory.existing(memory).take_epoch(), pytest.raises(RunLocked):
        RunDirectory.open(memory, grown(GROWN), PLAN, extension=extension())
    generation = latest_generation(memory)
    assert generation is not None
    assert generation.kind is GenerationKind.NEW


def test_a_driver_from_before_an_extension_signs_nothing(memory: MemoryStore) -> None:
    old = RunDirectory.open(memory, RECORD, PLAN, extension=BEGIN)
    for unit in FIRST:
        commit_part(memory, make_part(unit, RECORD.run_id, spec=SPEC))
    RunDirectory.open(memory, grown(GROWN), PLAN, extension=extension())
    with pytest.raises((Fenced, IntegrityError)):
        finalise(old, FIRST, SCHEMA, num_skipped_blank=0, max_error_rate=1.0)
    assert not memory.exists(SUCCESS)


def test_a_first_run_that_another_driver_began_is_planned_anew(memory: MemoryStore) -> None:
    RunDirectory.open(memory, make_record(SPEC, GROWN), PLAN, extension=BEGIN)
    with pytest.raises(PlanOutdated):
        RunDirectory.open(memory, RECORD, PLAN, extension=BEGIN)


def test_parts_that_were_signed_before_are_not_read_again(memory: MemoryStore) -> None:
    class Counting(MemoryStore):
        def read(self, key: str) -> bytes:
            read.append(key)
            return super().read(key)

    read: list[str] = []
    begin(memory)
    store = Counting()
    store.objects, store.written_s = memory.objects, memory.written_s
    store.open = memory.open  # type: ignore[method-assign]
    extend(store, GROWN)
    assert [key for key in read if key.startswith("part-")] == [part_name(n, RECORD.run8) for n in (4, 5)]


def test_the_error_budget_is_of_the_newest_generation(memory: MemoryStore) -> None:
    units = make_units(4, 30)
    record = make_record(SPEC, units)
    bad = [f"0:{n}" for n in range(11)]
    with pytest.raises(ErrorBudgetExceeded):
        drive(memory, SPEC, units, record=record, bad_rows=bad, extension=BEGIN)
    more = [*units, WorkUnit(4, 1, 0, 3, 0, 3)]
    directory = RunDirectory.open(
        memory,
        replace(make_record(SPEC, more), run_id=record.run_id),
        PLAN,
        extension=Extension(record.plan_digest),
    )
    commit_part(memory, make_part(more[4], record.run_id, spec=SPEC))
    success = finalise(directory, more, SCHEMA, num_skipped_blank=0, max_error_rate=0.01, first_unit=4)
    assert not success.partial
    assert success.counts.num_error == 11


def test_gc_takes_earlier_plans_and_no_keys(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), RECORD.run_id)
    drive(store, SPEC, FIRST, record=RECORD, extension=BEGIN)
    more = [*FIRST, ADDED[0]]
    drive(store, SPEC, more, record=grown(more), extension=extension())
    drive(store, SPEC, GROWN, record=grown(GROWN), extension=extension(grown(more)))
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    found = collect_garbage(str(tmp_path), 0.0)
    gone = [key for key in found.keys if "plan-" in key]
    assert gone == [f"__b2batch/{RECORD.run8}/plan-{grown(more).plan_digest[:8]}.parquet"]
    assert not [key for key in found.keys if "keys-" in key]
    directory = RunDirectory.existing(store)
    assert directory.read_plan() == PLAN
    assert list(directory.read_keys()) == [b"first keys", b"second keys", b"second keys"]
