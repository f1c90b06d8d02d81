from __future__ import annotations

import datetime as dt
import random
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from b2batch.errors import InputError, RowFault, Stage
from b2batch.inputs.arrow_rows import canonical_hash
from b2batch.inputs.plan import make_plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.spec import InputSpec

from .reading import read_all


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text(), max_size=40),
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from(["zstd", "snappy", "none"]),
)
def test_rows_and_hashes_are_the_same_whatever_the_layout(
    tmp_path: Path, texts: list[str], group_rows: int, rows_per_unit: int, codec: str
) -> None:
    table = pa.table({"text": pa.array(texts, pa.string()), "n": pa.array(range(len(texts)), pa.int32())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group_rows, compression=codec)
    found = read_all(tmp_path / "a.parquet", rows_per_unit=rows_per_unit)
    assert found.records == table.to_pylist()
    assert found.table.equals(table)
    assert [row.row_hash for row in found.rows] == [canonical_hash(row) for row in table.to_pylist()]


def test_units_in_any_order_are_the_same(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(100)}), tmp_path / "a.parquet", row_group_size=30)
    spec = InputSpec(path=str(tmp_path), rows_per_unit=7)
    plan = make_plan(spec)
    assert len(plan.units) == 17  # 5 + 5 + 5 + 2: no unit crosses a row group
    order = random.Random(0).sample(range(17), 17)
    with UnitReader(plan.files, plan.schema, spec) as reader:
        for index in order:
            unit = plan.units[index]
            numbers = [row.columns["n"] for row in reader.read(unit).rows]
            assert numbers == list(range(unit.first_row, unit.first_row + unit.num_rows))


def test_types_that_are_not_json_arrive_as_python_values(tmp_path: Path) -> None:
    when = dt.datetime(2024, 2, 29, 12, 30, 1, 5)
    table = pa.table(
        {
            "ns": pa.array([when], pa.timestamp("ns")),
            "day": pa.array([when.date()]),
            "cost": pa.array([Decimal("1.50")]),
            "raw": pa.array([b"\xff\x00"]),
            "tag": pa.array(["x"]).dictionary_encode(),
            "inner": pa.array([[{"at": when}]], pa.list_(pa.struct([("at", pa.timestamp("ns"))]))),
            "nan": pa.array([float("nan")]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    row = read_all(tmp_path).records[0]
    assert row.pop("nan") != row.get("nan")
    assert row == {
        "ns": when,
        "day": when.date(),
        "cost": Decimal("1.50"),
        "raw": b"\xff\x00",
        "tag": "x",
        "inner": [{"at": when}],
    }


def test_a_nanosecond_makes_another_row(tmp_path: Path) -> None:
    table = pa.table({"t": pa.array([1_000, 1_001, 1_000], pa.timestamp("ns"))})
    pq.write_table(table, tmp_path / "a.parquet")
    first, second, third = (row.row_hash for row in read_all(tmp_path).rows)
    assert first == third != second


def test_text_that_is_not_utf8_fails_its_own_row(tmp_path: Path) -> None:
    buffers = pa.array([b"good", b"\xff\xfe", "好".encode()]).buffers()
    pq.write_table(
        pa.table({"t": pa.StringArray.from_buffers(3, buffers[1], buffers[2])}), tmp_path / "a.parquet"
    )
    found = read_all(tmp_path)
    assert [row.columns.get("t") for row in found.rows] == ["good", None, "好"]
    assert found.table["t"].to_pylist() == ["good", None, "好"]
    failure = found.failures[1]
    assert (failure.fault, failure.stage) == (RowFault.INPUT_UTF8, Stage.READ)
    assert failure.message.startswith("a.parquet, row 1 ")


def test_a_value_that_does_not_widen_exactly_fails_its_own_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, (1 << 53) + 1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"n": [0.5]}), tmp_path / "b.parquet")
    found = read_all(tmp_path)
    assert found.table["n"].to_pylist() == [1.0, None, 0.5]
    assert {i: failure.fault for i, failure in found.failures.items()} == {1: RowFault.INPUT_SCHEMA}


def test_files_with_other_columns_are_refused_by_both_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"'b' is in .*y\.parquet but not in .*x\.parquet"):
        read_all(tmp_path)


def test_files_with_other_types_are_refused_by_both_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": ["1"]}), tmp_path / "y.parquet")
    with pytest.raises(InputError, match=r"'a' is int64 in .*x\.parquet but string in .*y\.parquet"):
        read_all(tmp_path)


def test_integers_of_one_file_and_floats_of_another_widen(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": pa.array([16_777_217], pa.int32())}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"a": pa.array([0.5], pa.float32())}), tmp_path / "y.parquet")
    assert read_all(tmp_path).table["a"].to_pylist() == [16_777_217.0, 0.5]


def test_a_required_column_is_null_where_a_row_failed(tmp_path: Path) -> None:
    schema = pa.schema([pa.field("n", pa.int64(), nullable=False)])
    pq.write_table(pa.table({"n": [1]}, schema=schema), tmp_path / "x.parquet")
    assert read_all(tmp_path).plan.schema.field("n").nullable


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"t": [str(i) * 20 for i in range(500)]}), tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(1, 11):
        (tmp_path / "a.parquet").write_bytes(whole[: len(whole) * cut // 11])
        with pytest.raises(InputError, match=r"a\.parquet"):
            read_all(tmp_path / "a.parquet")


def test_a_flipped_bit_is_noticed_where_the_writer_left_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"t": [f"text {i}" for i in range(500)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"text 250", b"text 25p"))
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read: .*checksum"):
        read_all(path)


def test_a_slice_of_a_huge_row_group_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array([f"{i:08d}" * 64 for i in range(2_000)])
    with pq.ParquetWriter(
        path, pa.schema([("t", pa.string())]), compression="none", use_dictionary=False
    ) as writer:
        writer.write_table(pa.table({"t": pa.concat_arrays([text] * 80)}), row_group_size=1 << 20)
    assert pq.ParquetFile(path).num_row_groups == 1
    assert path.stat().st_size > 64 << 20
    spec = InputSpec(path=str(path), fingerprint="fast")
    del text
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    plan = make_plan(spec)
    highest = 0
    with UnitReader(plan.files, plan.schema, spec) as reader:
        for index in (0, 1, len(plan.units) - 1):
            reader.read(plan.units[index])
            highest = max(highest, pa.total_allocated_bytes() - before)
    assert highest < 16 << 20


_READ_EACH = """
import sys
from b2batch.errors import InputError
from inputs.reading import read_all
for path in sys.argv[1:]:
    for format in ("auto", "parquet"):
        try:
            print(len(read_all(path, format=format).rows))
        except InputError as error:
            assert path in str(error), error
            print("refused")
"""


@pytest.mark.shared
@pytest.mark.parametrize("corpus", ["parquet-testing/bad_data", "arrow-testing/parquet-fuzzing"])
def test_known_corrupt_files_are_refused_or_read(shared_dir: Path, corpus: str) -> None:
    """In a process of its own: a crash of the decoder must fail this test, not end the session."""
    paths = sorted((shared_dir / "data/bad" / corpus).glob("*.parquet"))
    assert len(paths) >= 8
    ran = subprocess.run(
        [sys.executable, "-c", _READ_EACH, *map(str, paths)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"},
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = ran.stdout.split()
    assert len(answers) == 2 * len(paths)
    assert answers.count("refused") >= len(answers) * 0.8


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "num_rows"), [("mmlu_test", 14_042), ("bbh", 6_511), ("gaokao_objective", 1_781)]
)
def test_real_datasets(shared_dir: Path, name: str, num_rows: int) -> None:
    path = shared_dir / f"data/{name}.parquet"
    found = read_all(path)
    assert len(found.rows) == num_rows
    assert not found.failures
    assert found.table.cast(pq.read_schema(path)).equals(pq.read_table(path).replace_schema_metadata())
