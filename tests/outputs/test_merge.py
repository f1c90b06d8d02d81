"""Compaction: few large parts instead of many small ones, whatever happens on the way."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest

from b2batch.errors import IntegrityError, RunLocked
from b2batch.outputs.finalise import finalise
from b2batch.outputs.footer import read_part_footers
from b2batch.outputs.generation import GenerationKind
from b2batch.outputs.layout import SUCCESS, part_name
from b2batch.outputs.merge import Merge, begin_merge, plan_merge
from b2batch.outputs.parts import commit_part
from b2batch.outputs.run import RunDirectory, finish_merge
from b2batch.outputs.schema import output_schema
from b2batch.outputs.success import Success
from b2batch.outputs.verify import VerifyReport, verify

from .memory_store import CrashError, CrashingStore, MemoryStore
from .tiny_run import INPUT_SCHEMA, drive, make_part, make_record, make_spec, make_units, rows_digest

SPEC, UNITS = make_spec(), make_units(6)
RECORD = make_record(SPEC, UNITS)
SCHEMA = output_schema(INPUT_SCHEMA, SPEC)
OTHER_SPEC = make_spec("sampling.temperature=0.5")
ROW_IDS = sorted(f"0:{n}" for n in range(18))


@pytest.fixture
def finished(memory: MemoryStore) -> MemoryStore:
    drive(memory, SPEC, UNITS, bad_rows=["0:4"])
    return memory


def compact(store: MemoryStore, num_parts_each: int = 4) -> Merge | None:
    directory = RunDirectory.existing(store)
    success = directory.success()
    with directory.take_epoch() as epoch:
        merge = None
        if success is not None:
            size = max(size for _, size in store.list("part-"))
            merge = plan_merge(store, success, num_parts_each * size)
            if merge is None:
                return None
            begin_merge(store, directory.generation, merge)
        finish_merge(store, epoch)
        sign(store)
    return merge


def sign(store: MemoryStore) -> Success:
    directory = RunDirectory.existing(store)
    return finalise(directory, UNITS, SCHEMA, num_skipped_blank=1, max_error_rate=1.0)


def proof(store: MemoryStore, *, repair: bool = False) -> VerifyReport:
    return verify(RunDirectory.existing(store), UNITS, SCHEMA, rows_digest, repair=repair)


def names(store: MemoryStore) -> list[str]:
    return [key for key, _ in store.list("part-")]


def row_ids(store: MemoryStore) -> list[str]:
    tables = (pq.read_table(io.BytesIO(store.objects[name])) for name in names(store))
    return sorted(row_id for table in tables for row_id in table.column("row_id").to_pylist())


def test_parts_are_merged_and_proved(finished: MemoryStore) -> None:
    before = RunDirectory.existing(finished).success()
    merge = compact(finished)
    assert merge is not None
    assert names(finished) == [part_name(0, merge.merge8), part_name(4, merge.merge8)]
    assert row_ids(finished) == ROW_IDS
    assert proof(finished) == VerifyReport(num_parts=2, num_rows=18, problems=())
    after = RunDirectory.existing(finished).success()
    assert before is not None
    assert after is not None
    assert (after.counts, after.num_skipped_blank) == (before.counts, before.num_skipped_blank)


def test_a_merged_part_says_what_each_of_its_units_said(finished: MemoryStore) -> None:
    before = [footer for name in names(finished) for footer in read_part_footers(finished, name)]
    compact(finished)
    assert [footer for name in names(finished) for footer in read_part_footers(finished, name)] == before


def test_the_job_is_still_finished(finished: MemoryStore) -> None:
    compact(finished)
    before = dict(finished.objects)
    num_generated, success = drive(finished, SPEC, UNITS)
    assert num_generated == 0
    assert success.counts.num_rows == 18
    assert finished.objects == before


def test_failed_rows_are_listed_as_before(finished: MemoryStore) -> None:
    before = finished.read(RunDirectory.existing(finished).keys.errors)
    assert b"0:4" in before
    compact(finished)
    assert finished.read(RunDirectory.existing(finished).keys.errors) == before


def test_nothing_to_merge(finished: MemoryStore) -> None:
    assert compact(finished, num_parts_each=1) is None
    compact(finished, num_parts_each=100)
    assert compact(finished, num_parts_each=100) is None
    assert len(names(finished)) == 1


def test_merged_parts_are_merged_again(finished: MemoryStore) -> None:
    compact(finished, num_parts_each=2)
    assert len(names(finished)) == 3
    compact(finished, num_parts_each=100)
    assert len(names(finished)) == 1
    assert proof(finished).is_proved
    assert RunDirectory.existing(finished).generation.number == 3


def crashed(store: MemoryStore) -> Iterator[MemoryStore]:
    """A copy of ``store`` for each step at which a compaction can die, the dead driver's lease run out."""
    for num_steps in range(100):
        copy = MemoryStore()
        copy.objects, copy.written_s = dict(store.objects), dict(store.written_s)
        try:
            compact(CrashingStore(copy, num_steps))
        except CrashError:
            copy.now_s += 3600
            yield copy
        else:
            assert num_steps > 10
            return


def test_killed_anywhere_no_row_is_lost_and_the_same_command_completes_it(finished: MemoryStore) -> None:
    for store in crashed(finished):
        assert set(row_ids(store)) == set(ROW_IDS)
        if store.exists(SUCCESS):
            assert row_ids(store) == ROW_IDS, "what is signed is finished"
        compact(store)
        report = proof(store)
        assert (report.num_rows, report.problems) == (18, ())
        assert report.num_parts <= 2


def test_killed_anywhere_the_next_run_completes_it_and_generates_nothing(finished: MemoryStore) -> None:
    for store in crashed(finished):
        assert drive(store, SPEC, UNITS)[0] == 0
        assert proof(store).is_proved
        assert row_ids(store) == ROW_IDS


def test_killed_anywhere_it_can_be_overwritten(finished: MemoryStore) -> None:
    for store in crashed(finished):
        assert drive(store, OTHER_SPEC, UNITS, overwrite=True)[0] == 6
        assert row_ids(store) == ROW_IDS
        assert {name.split("-")[2][:8] for name in names(store)} == {make_record(OTHER_SPEC, UNITS).run8}


def test_cut_short_it_is_told_and_not_repaired_away(finished: MemoryStore) -> None:
    told = 0
    for store in crashed(finished):
        if RunDirectory.existing(store).generation.is_merging:
            report = proof(store, repair=True)
            assert "`b2batch compact`" in report.problems[0]
            assert report.removed == ()
            told += 1
    assert told > 5


def test_a_damaged_part_is_left_with_its_neighbours_and_the_others_are_merged(finished: MemoryStore) -> None:
    bad = part_name(5, RECORD.run8)
    damaged = bytearray(finished.objects[bad])
    damaged[len(damaged) // 3] ^= 1
    finished.objects[bad] = bytes(damaged)
    with pytest.raises(IntegrityError, match=bad):
        compact(finished)
    assert len(names(finished)) == 3
    report = proof(finished, repair=True)
    assert report.removed == (SUCCESS, bad)
    assert drive(finished, SPEC, UNITS)[0] == 1
    assert proof(finished).is_proved
    assert row_ids(finished) == ROW_IDS


def test_repair_of_a_merged_part_makes_its_units_again(finished: MemoryStore) -> None:
    merge = compact(finished)
    assert merge is not None
    bad = part_name(4, merge.merge8)
    finished.objects[bad] = finished.objects[bad][:-7]
    assert proof(finished, repair=True).removed == (SUCCESS, bad)
    assert RunDirectory.existing(finished).num_committed() == 4
    assert drive(finished, SPEC, UNITS)[0] == 2
    assert proof(finished) == VerifyReport(num_parts=3, num_rows=18, problems=())


def test_overwriting_a_compacted_run_leaves_nothing_of_it(finished: MemoryStore) -> None:
    merge = compact(finished)
    assert merge is not None
    drive(finished, OTHER_SPEC, UNITS, overwrite=True)
    assert not [key for key in finished.objects if merge.merge8 in key or RECORD.run8 in key]


def test_a_late_copy_of_a_merged_unit_is_found_and_removed(finished: MemoryStore) -> None:
    compact(finished)
    late = make_part(UNITS[1], RECORD.run_id, attempt=3)
    commit_part(finished, late)
    report = proof(finished, repair=True)
    assert f"{late.name}: its rows stand in a merged part too" in report.problems
    assert late.name in report.removed
    drive(finished, SPEC, UNITS)
    assert proof(finished).is_proved


def test_a_late_copy_does_not_count_when_the_run_is_finalised(finished: MemoryStore) -> None:
    compact(finished)
    finished.delete(SUCCESS)
    commit_part(finished, make_part(UNITS[1], RECORD.run_id, attempt=3))
    assert drive(finished, SPEC, UNITS)[0] == 0
    assert row_ids(finished) == ROW_IDS


def test_two_at_once(finished: MemoryStore) -> None:
    directory = RunDirectory.existing(finished)
    success = directory.success()
    assert success is not None
    with directory.take_epoch(), pytest.raises(RunLocked):
        compact(finished)
    merge = plan_merge(finished, success, 1 << 30)
    assert merge is not None
    compact(finished)
    with pytest.raises(RunLocked, match="another command"):
        begin_merge(finished, directory.generation, merge)
    assert RunDirectory.existing(finished).generation.kind is GenerationKind.COMPACT
