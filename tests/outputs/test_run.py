from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from b2batch.errors import DriftError, Fenced, IntegrityError, OutputError, RunLocked
from b2batch.outputs.generation import latest_generation
from b2batch.outputs.layout import SUCCESS, RunKeys
from b2batch.outputs.parts import commit_part
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import LocalStore, open_store
from b2batch.rows import UnitCounts
from b2batch.spec import JobSpec

from .memory_store import CrashError, CrashingStore, MemoryStore
from .tiny_run import PLAN, drive, make_part, make_record, make_spec, make_units, run_at

SPEC, UNITS = make_spec(), make_units()
RECORD = make_record(SPEC, UNITS)
OTHER_SPEC = make_spec("sampling.temperature=0.5")
OTHER = make_record(OTHER_SPEC, UNITS)


def start(store: MemoryStore, num_parts: int = 2) -> RunDirectory:
    """A run that was stopped after its first parts."""
    directory = RunDirectory.open(store, RECORD, PLAN)
    for unit in UNITS[:num_parts]:
        commit_part(store, make_part(unit, RECORD.run_id))
    return directory


def parts(store: MemoryStore) -> dict[str, bytes]:
    return {key: store.objects[key] for key, _ in store.list("part-")}


def test_new_run_keeps_what_it_was_made_from(memory: MemoryStore) -> None:
    directory = RunDirectory.open(memory, RECORD, PLAN)
    assert directory.read_plan() == PLAN
    assert directory.committed_units(UNITS) == {}
    assert directory.success() is None
    found = RunDirectory.existing(memory)
    assert found.record.run_id == RECORD.run_id
    assert found.record.spec["sampling"]["temperature"] == 0.0
    assert found.record.files == list(RECORD.files)


def test_the_same_run_goes_on_where_it_stopped(memory: MemoryStore) -> None:
    start(memory)
    before = parts(memory)
    assert RunDirectory.open(memory, RECORD, PLAN).committed_units(UNITS) == {
        0: UnitCounts(3, 0, 0, 21, 6),
        1: UnitCounts(3, 0, 0, 21, 6),
    }
    num_generated, success = drive(memory, SPEC, UNITS)
    assert num_generated == 2
    assert success.counts.num_ok == 12
    assert before.items() <= parts(memory).items(), "a committed part must never change"


def test_finished_run_is_only_read(tmp_path: Path) -> None:
    def tree() -> list[tuple[Path, int, int]]:
        return [(path, path.stat().st_mtime_ns, path.stat().st_ino) for path in sorted(tmp_path.rglob("*"))]

    run_at(tmp_path)
    before = tree()
    num_generated, success = run_at(tmp_path)
    assert num_generated == 0
    assert success.counts.num_rows == 12
    assert tree() == before


def test_other_config_is_refused_and_nothing_touched(memory: MemoryStore) -> None:
    start(memory)
    before = dict(memory.objects)
    with pytest.raises(DriftError, match=r"sampling\.temperature: 0\.0 -> 0\.5"):
        RunDirectory.open(memory, OTHER, PLAN)
    assert memory.objects == before


def test_other_environment_is_the_same_run_and_warned_about(
    memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    start(memory)
    RunDirectory.open(memory, make_record(SPEC, UNITS, provenance={"torch": "2.14"}), PLAN)
    assert 'torch: "2.13" -> "2.14"' in caplog.text


def test_losing_the_race_for_a_new_directory_is_drift(memory: MemoryStore) -> None:
    class Racing(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if key.endswith("gen-0001.json") and not self.exists(key):
                RunDirectory.open(_Plain(self), OTHER, PLAN)
            return super().put_if_absent(key, data)

    class _Plain(MemoryStore):
        def __init__(self, shared: MemoryStore) -> None:
            super().__init__()
            self.objects, self.written_s = shared.objects, shared.written_s

    with pytest.raises(DriftError, match="temperature"):
        RunDirectory.open(Racing(), RECORD, PLAN)


# --- foreign files -------------------------------------------------------------------------------


def test_files_of_no_run_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("keep")
    with pytest.raises(OutputError, match=r"thesis\.tex.*--allow-foreign") as raised:
        run_at(tmp_path)
    assert raised.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_foreign_files_stay_through_run_and_overwrite(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("keep")
    (tmp_path / "part-000000-deadbeef.parquet").write_text("keep")
    run_at(tmp_path, allow_foreign=True)
    run_at(tmp_path, "sampling.temperature=0.5", overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "keep"
    assert (tmp_path / "part-000000-deadbeef.parquet").read_text() == "keep"


def test_nothing_there() -> None:
    with pytest.raises(OutputError, match="no b2batch run"):
        RunDirectory.existing(MemoryStore())


# --- resume trusts footers -----------------------------------------------------------------------


def test_damaged_part_is_named_with_the_way_out(memory: MemoryStore) -> None:
    directory = start(memory)
    name = make_part(UNITS[1], RECORD.run_id).name
    memory.objects[name] = memory.objects[name][:-9]
    with pytest.raises(IntegrityError, match=rf"{name}.*--repair"):
        directory.committed_units(UNITS)


def test_part_under_another_units_name_is_not_that_unit(memory: MemoryStore) -> None:
    directory = start(memory)
    names = [make_part(unit, RECORD.run_id).name for unit in UNITS]
    memory.objects[names[2]] = memory.objects[names[1]]
    with pytest.raises(IntegrityError, match="unit is 1, planned is 2"):
        directory.committed_units(UNITS)


def test_part_of_no_planned_unit(memory: MemoryStore) -> None:
    directory = start(memory)
    with pytest.raises(IntegrityError, match="not in the plan"):
        directory.committed_units(UNITS[:1])


def test_receipt_of_a_committed_unit(memory: MemoryStore) -> None:
    directory = start(memory)
    report = directory.find_part(UNITS[0])
    assert report is not None
    assert not report.newly_committed
    assert report.counts.num_ok == 3
    assert directory.find_part(UNITS[3]) is None


# --- overwrite -----------------------------------------------------------------------------------


def test_overwrite_replaces_another_run(memory: MemoryStore) -> None:
    drive(memory, SPEC, UNITS)
    num_generated, _ = drive(memory, OTHER_SPEC, UNITS, overwrite=True)
    assert num_generated == 4
    assert {key.split("-")[2][:8] for key in parts(memory)} == {OTHER.run8}
    assert not [key for key in memory.objects if RECORD.run8 in key]
    assert drive(memory, OTHER_SPEC, UNITS)[0] == 0


def test_overwrite_does_a_finished_run_again_and_goes_on_with_an_unfinished_one(memory: MemoryStore) -> None:
    drive(memory, SPEC, UNITS)
    assert drive(memory, SPEC, UNITS, overwrite=True)[0] == 4
    memory.delete(SUCCESS)
    memory.delete(make_part(UNITS[2], RECORD.run_id).name)
    assert drive(memory, SPEC, UNITS, overwrite=True)[0] == 1


def test_a_chain_of_overwrites_ends_with_the_last(memory: MemoryStore) -> None:
    for spec in (SPEC, OTHER_SPEC, SPEC, OTHER_SPEC):
        assert drive(memory, spec, UNITS, overwrite=True)[0] == 4
    assert len(parts(memory)) == 4
    generation = latest_generation(memory)
    assert generation is not None
    assert generation.number == 4


def test_run_with_a_live_driver_is_not_overwritten(memory: MemoryStore) -> None:
    directory = start(memory)
    before = parts(memory)
    with directory.take_epoch(), pytest.raises(RunLocked):
        RunDirectory.open(memory, OTHER, PLAN, overwrite=True)
    assert parts(memory) == before
    assert RunDirectory.existing(memory).record.run_id == RECORD.run_id


@pytest.mark.parametrize("new_spec", [OTHER_SPEC, SPEC], ids=["another run", "the same run again"])
def test_overwrite_that_crashes_anywhere_is_completed_by_the_next_start(new_spec: JobSpec) -> None:
    for num_steps in range(100):
        store = MemoryStore()
        drive(store, SPEC, UNITS)
        try:
            drive(CrashingStore(store, num_steps), new_spec, UNITS, overwrite=True)
        except CrashError:
            store.now_s += 3600  # the lease of the dead driver
        else:
            break
        # A reader may take the output for finished only while all of the old run is there.
        assert not store.exists(SUCCESS) or len(parts(store)) == 4
        new_record = make_record(new_spec, UNITS)
        drive(store, new_spec, UNITS, overwrite=True)
        assert {key.split("-")[2][:8] for key in parts(store)} == {new_record.run8}
        assert len(parts(store)) == 4
        if new_spec is OTHER_SPEC:
            assert not [key for key in store.objects if RECORD.run8 in key]
        assert drive(store, new_spec, UNITS)[0] == 0
    else:
        pytest.fail("the overwrite never got through")
    assert num_steps > 15


def test_overwrite_that_crashed_is_itself_overwritten() -> None:
    third = make_spec("sampling.temperature=0.9")
    for num_steps in range(5, 25):
        store = MemoryStore()
        drive(store, SPEC, UNITS)
        with contextlib.suppress(CrashError):
            drive(CrashingStore(store, num_steps), OTHER_SPEC, UNITS, overwrite=True)
        store.now_s += 3600
        drive(store, third, UNITS, overwrite=True)
        assert {key.split("-")[2][:8] for key in parts(store)} == {make_record(third, UNITS).run8}


def test_nothing_can_be_committed_to_a_run_while_it_is_erased(tmp_path: Path) -> None:
    class Watched(LocalStore):
        def delete(self, key: str) -> None:
            super().delete(key)
            if key.startswith("part-"):
                with pytest.raises(Fenced):
                    commit_part(late, make_part(UNITS[0], RECORD.run_id))

    run_at(tmp_path)
    late = open_store(str(tmp_path), RECORD.run_id)
    drive(Watched(tmp_path, RunKeys(OTHER.run8).staging), OTHER_SPEC, UNITS, overwrite=True)
    assert {path.name.split("-")[2][:8] for path in tmp_path.glob("part-*")} == {OTHER.run8}


def test_late_writer_of_an_overwritten_run_is_fenced(tmp_path: Path) -> None:
    run_at(tmp_path)
    late = open_store(str(tmp_path), RECORD.run_id)
    run_at(tmp_path, "sampling.temperature=0.5", overwrite=True)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(Fenced):
        commit_part(late, make_part(UNITS[0], RECORD.run_id))
    assert sorted(os.listdir(tmp_path)) == before
