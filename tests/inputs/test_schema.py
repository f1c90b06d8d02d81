from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from b2batch.errors import InputError, RowFault, SpecError
from b2batch.inputs.schema import check_columns

from .reading import read_all


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("values", "type_", "stored"),
    [
        ([1, 2.5], "double", [1.0, 2.5]),
        ([0.5, 1 << 60], "double", [0.5, 2.0**60]),
        ([1, None, 3], "int64", [1, None, 3]),
        ([1, (1 << 64) - 1], "uint64", [1, (1 << 64) - 1]),
        ([-1, (1 << 64) - 1], "string", ["-1", "18446744073709551615"]),
        ([None, None], "string", [None, None]),
        ([True, False], "bool", [True, False]),
        ([True, 1], "string", ["true", "1"]),
        (["a", 1, {"b": "好"}], "string", ["a", "1", '{"b":"好"}']),
        ([[1], [2.5, None]], "list<item: double>", [[1.0], [2.5, None]]),
        ([[], None], "list<item: string>", [[], None]),
        ([[1], "a"], "string", ["[1]", "a"]),
        (
            [MESSAGES, MESSAGES * 2],
            "list<item: struct<role: string, content: string>>",
            [MESSAGES, MESSAGES * 2],
        ),
        ([{"a": 1}, {"a": 1, "b": 2}], "string", ['{"a":1}', '{"a":1,"b":2}']),
        ([{"a": 1}, {"a": "x"}], "struct<a: string>", [{"a": "1"}, {"a": "x"}]),
        ([{}, {}], "string", ["{}", "{}"]),
    ],
)
def test_the_type_of_a_column(tmp_path: Path, values: list[Any], type_: str, stored: list[Any]) -> None:
    found = read_all(write(tmp_path / "a.jsonl", *({"v": value} for value in values)))
    assert str(found.plan.schema.field("v").type) == type_
    assert found.table["v"].to_pylist() == stored
    assert [row.columns["v"] for row in found.rows] == values
    pq.write_table(found.table, tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["v"].to_pylist() == stored


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"k":', "}")])
def test_deep_nesting_is_carried_in_a_type_that_parquet_can_read(
    tmp_path: Path, opening: str, closing: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"v":' + opening * 99 + "1" + closing * 99 + "}")
    found = read_all(tmp_path)
    pq.write_table(found.table, tmp_path / "out.parquet")
    stored = pq.read_table(tmp_path / "out.parquet")["v"].to_pylist()[0]
    while not isinstance(stored, str):
        stored = stored[0] if isinstance(stored, list) else stored["k"]
    assert stored.count(opening) > 80


def test_a_missing_key_is_null(tmp_path: Path) -> None:
    found = read_all(write(tmp_path / "a.jsonl", {"a": 1}, {"b": "x"}))
    assert found.records == found.table.to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def test_types_unify_over_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"v": None, "w": 1})
    write(tmp_path / "b.jsonl", {"v": 1, "w": "x"})
    found = read_all(tmp_path)
    assert found.table.to_pylist() == [{"v": None, "w": "1"}, {"v": 1, "w": "x"}]


@pytest.mark.parametrize(
    ("first", "later", "said"),
    [
        ({"n": 1}, {"n": "one"}, "column 'n': expected int64, found string"),
        ({"n": 1}, {"n": 1.5}, "column 'n': expected int64, found number"),
        ({"n": 1}, {"n": True}, "column 'n': expected int64, found boolean"),
        ({"n": 1}, {"n": 1 << 63}, "column 'n': expected int64, found the integer 9223372036854775808"),
        ({"n": 0.5}, {"n": (1 << 53) + 1}, "column 'n': expected double, found the integer"),
        ({"n": [1]}, {"n": ["x"]}, "column 'n'[]: expected int64, found string"),
        ({"n": {"a": 1}}, {"n": {"a": []}}, "column 'n'.'a': expected int64, found array"),
        ({"n": {"a": 1}}, {"n": {"b": 1}}, "column 'n': the key 'b' is not among 'a'"),
        ({"n": 1}, {"n": 1, "m": 2}, "column 'm': expected no such column"),
    ],
)
def test_a_later_row_that_does_not_fit_fails_alone(
    tmp_path: Path, first: dict[str, Any], later: dict[str, Any], said: str
) -> None:
    found = read_all(write(tmp_path / "a.jsonl", first, later, first), infer_rows=1)
    assert {i: failure.fault for i, failure in found.failures.items()} == {1: RowFault.INPUT_SCHEMA}
    message = found.failures[1].message
    assert message.startswith("a.jsonl, line 2: ")
    assert said in message
    assert "input.infer_rows (1)" in message


def test_the_same_rows_as_jsonl_and_parquet_are_the_same_records(tmp_path: Path) -> None:
    rows = [{"t": "好", "n": 1, "m": MESSAGES}, {"t": None, "n": 2, "m": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", *rows)
    found = read_all(tmp_path)
    assert found.records == rows * 2
    assert found.table.to_pylist() == rows * 2


def test_formats_that_disagree_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"v": [1]}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", {"v": "x"})
    with pytest.raises(InputError, match=r"'v' is int64 in .*a\.parquet but string in a JSON Lines input"):
        read_all(tmp_path)


def test_formats_mix_where_json_lines_say_nothing_of_a_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"d": pa.array([0], pa.date32()), "v": [1]}), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", {"v": 0.5}, {"v": 2, "w": "x"})
    found = read_all(tmp_path)
    assert found.table["v"].to_pylist() == [1.0, 0.5, 2.0]
    assert found.table["w"].to_pylist() == [None, None, "x"]
    assert found.records[1]["d"] is None


def test_names_that_are_no_columns_are_refused_with_the_nearest() -> None:
    schema = pa.schema([("review_id", pa.string()), ("text", pa.string())])
    check_columns(schema, ["text", "review_id"], "output.columns")
    with pytest.raises(
        SpecError, match=r"input\.key: the input has no column 'reviewid'; did you mean 'review_id'"
    ):
        check_columns(schema, ["reviewid"], "input.key")
    with pytest.raises(SpecError, match=r"it has: review_id, text"):
        check_columns(schema, ["zzz"], "input.key")
    check_columns(pa.schema([]), ["anything"], "input.key")
