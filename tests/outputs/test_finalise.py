from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from b2batch.errors import ErrorBudgetExceeded, IntegrityError
from b2batch.outputs import finalise as finalise_module
from b2batch.outputs.finalise import finalise
from b2batch.outputs.layout import SUCCESS, RunKeys, part_name
from b2batch.outputs.parts import commit_part
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.success import Success, allowed_errors
from b2batch.rows import UnitCounts

from .memory_store import MemoryStore
from .tiny_run import INPUT_SCHEMA, PLAN, drive, failed, make_part, make_record, make_spec, make_units, run_at

SPEC, UNITS = make_spec(), make_units()
RECORD = make_record(SPEC, UNITS)
SCHEMA = output_schema(INPUT_SCHEMA, SPEC)


def close(directory: RunDirectory) -> Success:
    return finalise(directory, UNITS, SCHEMA, num_skipped_blank=2, max_error_rate=0.01)


def all_but(store: MemoryStore, *missing: int) -> RunDirectory:
    directory = RunDirectory.open(store, RECORD, PLAN)
    for unit in UNITS:
        if unit.index not in missing:
            commit_part(store, make_part(unit, RECORD.run_id))
    return directory


def test_success_accounts_for_every_row(memory: MemoryStore) -> None:
    _, success = drive(memory, SPEC, UNITS, bad_rows=["0:1", "0:7"])
    assert success.counts == UnitCounts(10, 2, 0, 70, 20)
    document = json.loads(memory.read(SUCCESS))
    assert document["run_id"] == RECORD.run_id
    assert document["rows"] == {"ok": 10, "error": 2, "length": 0}
    assert document["skipped_blank"] == 1
    assert document["partial"] is False
    assert {name: part["rows"] for name, part in document["parts"].items()} == {
        part_name(index, RECORD.run8): 3 for index in range(4)
    }
    assert RunDirectory.existing(memory).success() == success


def test_failed_rows_are_listed_with_file_and_message(memory: MemoryStore) -> None:
    drive(memory, SPEC, UNITS, bad_rows=["0:1", "0:7"])
    lines = [json.loads(line) for line in memory.read(RunKeys(RECORD.run8).errors).splitlines()]
    assert lines == [
        {
            "row_id": row_id,
            "file": "reviews.jsonl",
            "type": "PROMPT_MISSING",
            "message": "no text",
            "stage": "render",
            "attempts": 1,
        }
        for row_id in ("0:1", "0:7")
    ]


def test_error_list_is_bounded(memory: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finalise_module, "MAX_LISTED_ERRORS", 4)
    drive(memory, SPEC, UNITS, bad_rows=[f"0:{ordinal}" for ordinal in range(8)])
    lines = memory.read(RunKeys(RECORD.run8).errors).splitlines()
    assert [json.loads(line)["row_id"] for line in lines] == ["0:0", "0:1", "0:2", "0:3"]


def test_no_success_while_a_unit_is_missing(memory: MemoryStore) -> None:
    with pytest.raises(IntegrityError, match=part_name(2, RECORD.run8)):
        close(all_but(memory, 2))
    assert not memory.exists(SUCCESS)


def test_no_success_with_another_runs_part_under_our_name(memory: MemoryStore) -> None:
    directory = all_but(memory, 1)
    name = part_name(1, RECORD.run8)
    memory.objects[name] = make_part(UNITS[1], RECORD.run8 + "0" * 56).data
    with pytest.raises(IntegrityError, match=rf"{name} does not belong"):
        close(directory)
    assert not memory.exists(SUCCESS)


def test_no_success_with_a_part_of_no_unit(memory: MemoryStore) -> None:
    directory = all_but(memory)
    commit_part(memory, make_part(make_units(5)[4], RECORD.run_id))
    with pytest.raises(IntegrityError, match="not in the plan"):
        close(directory)
    assert not memory.exists(SUCCESS)


def test_finalise_again_changes_nothing(memory: MemoryStore) -> None:
    directory = all_but(memory)
    success = close(directory)
    before = dict(memory.objects)
    assert close(directory) == success
    assert memory.objects == before


def test_parts_changed_after_success_are_not_signed_again(memory: MemoryStore) -> None:
    directory = all_but(memory)
    close(directory)
    memory.objects[part_name(0, RECORD.run8)] = make_part(UNITS[0], RECORD.run_id, attempt=9).data
    with pytest.raises(IntegrityError, match=SUCCESS):
        close(directory)


def test_foreign_files_are_told_and_not_counted(
    memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    directory = all_but(memory)
    stray = part_name(0, "deadbeef")
    memory.objects[stray] = make_part(UNITS[0], "deadbeef" * 8).data
    memory.objects["_ignored_by_readers"] = b""
    assert close(directory).counts.num_rows == 12
    assert directory.foreign_files() == [stray]
    assert stray in caplog.text


def test_late_part_of_a_replaced_run_is_removed(memory: MemoryStore) -> None:
    drive(memory, make_spec("sampling.temperature=0.5"), UNITS)
    old8 = make_record(make_spec("sampling.temperature=0.5"), UNITS).run8
    directory = RunDirectory.open(memory, RECORD, PLAN, overwrite=True)
    for unit in UNITS:
        commit_part(memory, make_part(unit, RECORD.run_id))
    memory.objects[part_name(3, old8)] = b"written by a worker that was away"
    close(directory)
    assert not [key for key in memory.objects if old8 in key and key.startswith("part-")]


def test_nothing_staged_is_left(memory: MemoryStore) -> None:
    directory = all_but(memory)
    memory.put(f"{directory.keys.staging}/orphan", b"")
    close(directory)
    assert list(memory.list(directory.keys.staging)) == []


# --- the error budget ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "rate", "allowed"),
    [(100, 0.01, 10), (5000, 0.01, 50), (50, 0.0, 0), (3, 1.0, 10), (0, 0.5, 10)],
)
def test_allowed_errors(num_rows: int, rate: float, allowed: int) -> None:
    assert allowed_errors(num_rows, rate) == allowed


def test_over_the_budget_everything_is_written_and_told(memory: MemoryStore) -> None:
    bad_rows = [f"0:{ordinal}" for ordinal in range(11)]
    with pytest.raises(ErrorBudgetExceeded, match="11 of 12 rows failed, 10 are allowed") as raised:
        drive(memory, SPEC, UNITS, bad_rows=bad_rows)
    assert raised.value.exit_code == 3
    success = RunDirectory.existing(memory).success()
    assert success is not None
    assert success.partial
    assert success.counts.num_error == 11


def test_a_larger_budget_makes_a_partial_success_whole(memory: MemoryStore) -> None:
    units = make_units(4, 5)
    directory = RunDirectory.open(memory, make_record(SPEC, units), PLAN)
    for unit in units:
        results = [failed(f"0:{unit.first_row + offset}") for offset in range(5)]
        commit_part(memory, make_part(unit, directory.record.run_id, results=results))
    with pytest.raises(ErrorBudgetExceeded):
        finalise(directory, units, SCHEMA, num_skipped_blank=0, max_error_rate=0.01)
    finalise(directory, units, SCHEMA, num_skipped_blank=0, max_error_rate=1.0)
    success = directory.success()
    assert success is not None
    assert not success.partial


# --- no rows -------------------------------------------------------------------------------------


def test_input_without_rows_still_has_a_schema(tmp_path: Path) -> None:
    _, success = run_at(tmp_path, num_units=0)
    assert success.counts.num_rows == 0
    table = pq.read_table(tmp_path)
    assert table.num_rows == 0
    assert table.schema.names == SCHEMA.names
    assert run_at(tmp_path, num_units=0)[0] == 0
