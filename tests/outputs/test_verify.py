from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.errors import RunLocked
from b2batch.outputs.layout import SUCCESS, part_name
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.outputs.verify import VerifyReport, verify
from b2batch.rows import WorkUnit

from .memory_store import MemoryStore
from .tiny_run import INPUT_SCHEMA, drive, make_part, make_record, make_spec, make_units, rows_digest, run_at

SPEC, UNITS = make_spec(), make_units()
RECORD = make_record(SPEC, UNITS)
SCHEMA = output_schema(INPUT_SCHEMA, SPEC)
NAMES = [part_name(unit.index, RECORD.run8) for unit in UNITS]


@pytest.fixture
def finished(memory: MemoryStore) -> MemoryStore:
    drive(memory, SPEC, UNITS, bad_rows=["0:4"])
    return memory


def proof(store: MemoryStore, *, repair: bool = False) -> VerifyReport:
    return verify(RunDirectory.existing(store), UNITS, SCHEMA, rows_digest, repair=repair)


def test_sound_output(finished: MemoryStore) -> None:
    report = proof(finished)
    assert report == VerifyReport(num_parts=4, num_rows=12, problems=())
    assert report.is_proved


def test_empty_output(memory: MemoryStore) -> None:
    drive(memory, SPEC, [])
    assert verify(RunDirectory.existing(memory), [], SCHEMA).is_proved


def test_missing_part(finished: MemoryStore) -> None:
    finished.delete(NAMES[2])
    assert f"{NAMES[2]}: missing" in proof(finished).problems


def test_unfinished_run(finished: MemoryStore) -> None:
    finished.delete(SUCCESS)
    assert proof(finished).problems == (f"{SUCCESS} is missing: the run is not finished",)


@settings(max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    store = MemoryStore()
    drive(store, SPEC, UNITS[:2])
    name = part_name(1, make_record(SPEC, UNITS[:2]).run8)
    damaged = bytearray(store.objects[name])
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    store.objects[name] = bytes(damaged)
    report = verify(RunDirectory.existing(store), UNITS[:2], SCHEMA, rows_digest)
    assert any(name in problem for problem in report.problems)


def test_flipped_bit_in_a_page_is_found_without_success(finished: MemoryStore) -> None:
    finished.delete(SUCCESS)
    damaged = bytearray(finished.objects[NAMES[1]])
    column = pq.read_metadata(io.BytesIO(bytes(damaged))).row_group(0).column(0)
    damaged[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    finished.objects[NAMES[1]] = bytes(damaged)
    assert any(problem.startswith(f"{NAMES[1]}: damaged: ") for problem in proof(finished).problems)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated_part(finished: MemoryStore, cut: int) -> None:
    finished.objects[NAMES[0]] = finished.objects[NAMES[0]][:cut]
    assert any(problem.startswith(f"{NAMES[0]} is damaged: ") for problem in proof(finished).problems)


def test_part_that_was_made_again(finished: MemoryStore) -> None:
    finished.objects[NAMES[0]] = make_part(UNITS[0], RECORD.run_id, attempt=9).data
    assert proof(finished).problems == (
        f"{NAMES[0]}: sha256 is not the one in {SUCCESS}: changed since it was committed",
    )


def test_part_with_rows_of_another(finished: MemoryStore) -> None:
    finished.objects[NAMES[0]] = finished.objects[NAMES[3]]
    assert any("unit is 3, planned is 0" in problem for problem in proof(finished).problems)


def test_rows_in_another_order(finished: MemoryStore) -> None:
    finished.delete(SUCCESS)
    table = pq.read_table(io.BytesIO(finished.objects[NAMES[0]]))
    sink = io.BytesIO()
    pq.write_table(table.take([1, 0, 2]), sink, write_page_checksum=True)
    finished.objects[NAMES[0]] = sink.getvalue()
    assert f"{NAMES[0]}: its row_ids are not the planned ones in order" in proof(finished).problems


def test_status_that_does_not_fit_the_footer(finished: MemoryStore) -> None:
    table = pq.read_table(io.BytesIO(finished.objects[NAMES[1]]))
    column = table.schema.get_field_index("status")
    sink = io.BytesIO()
    pq.write_table(table.set_column(column, table.schema.field("status"), [["ok"] * 3]), sink)
    finished.objects[NAMES[1]] = sink.getvalue()
    assert f"{NAMES[1]}: status, error and the counts of its footer disagree" in proof(finished).problems


def test_schema_of_another_job(finished: MemoryStore) -> None:
    other = output_schema(INPUT_SCHEMA, make_spec(prefix="b2_"))
    report = verify(RunDirectory.existing(finished), UNITS, other)
    assert report.problems == tuple(f"{name}: its schema is not that of the job" for name in NAMES)


def test_input_that_changed(finished: MemoryStore) -> None:
    def changed(unit: WorkUnit) -> str:
        return "00" * 16 if unit.index == 2 else rows_digest(unit)

    report = verify(RunDirectory.existing(finished), UNITS, SCHEMA, changed)
    assert report.problems == (f"{NAMES[2]}: its rows are not those of the input reviews.jsonl",)


def test_foreign_part_and_leftover_are_listed_and_left_alone(finished: MemoryStore) -> None:
    stray = part_name(0, "deadbeef")
    leftover = f"__b2batch/{RECORD.run8}/tmp/0123"
    finished.objects[stray] = finished.objects[leftover] = b"?"
    report = proof(finished, repair=True)
    assert report.problems == (
        f"{stray}: not a part of this run, but whoever reads the directory takes it in",
        f"{leftover}: left behind by a writer that died",
    )
    assert report.removed == ()
    assert finished.exists(stray)
    assert finished.exists(SUCCESS)


def test_unreadable_success(finished: MemoryStore) -> None:
    finished.objects[SUCCESS] = b"{}"
    assert any(SUCCESS in problem for problem in proof(finished).problems)


def test_repair_lets_the_next_run_make_only_the_bad_part_again(finished: MemoryStore) -> None:
    good = {name: finished.objects[name] for name in NAMES if name != NAMES[1]}
    finished.objects[NAMES[1]] = finished.objects[NAMES[1]][:-1]
    report = proof(finished, repair=True)
    assert report.removed == (SUCCESS, NAMES[1])
    assert drive(finished, SPEC, UNITS, bad_rows=["0:4"])[0] == 1
    assert proof(finished).is_proved
    assert good.items() <= finished.objects.items()


def test_repair_does_not_touch_a_run_at_work(finished: MemoryStore) -> None:
    finished.objects[NAMES[1]] = b""
    with RunDirectory.existing(finished).take_epoch(), pytest.raises(RunLocked):
        proof(finished, repair=True)
    assert finished.exists(NAMES[1])


def test_flipped_bit_on_disk(tmp_path: Path) -> None:
    run_at(tmp_path)
    path = tmp_path / NAMES[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    report = verify(RunDirectory.existing(open_store(str(tmp_path))), UNITS, SCHEMA)
    assert any(NAMES[0] in problem for problem in report.problems)
