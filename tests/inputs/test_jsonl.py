from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from b2batch.errors import InputError, RowFault, Stage
from b2batch.inputs.plan import make_plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.spec import InputSpec

from .reading import COMPRESSORS, read_all

QUIET = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["a\u2028b", "a\x85b\u2029", "\x0b\x0c\x00", "{{ x }}", "\ufeff"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
# One kind a column, so that no row fails to fit; conflicting kinds have their own test below.
records = st.lists(
    st.fixed_dictionaries({}, optional={"a": values, "b": st.text(), "c": values, "d": st.integers(0, 9)}),
    max_size=25,
)
blank = st.sampled_from([b"", b" \t", b"\r"])


@st.composite
def documents(draw: Any) -> tuple[list[Any], bytes]:
    """Records, and a JSON Lines text of them with blank lines, mixed endings and maybe no final newline."""
    rows = draw(records)
    pieces = [b"\xef\xbb\xbf"] if draw(st.booleans()) else []
    for row in rows:
        pieces += [line + b"\n" for line in draw(st.lists(blank, max_size=2))]
        line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode()
        pieces.append(line + draw(st.sampled_from([b"\n", b"\r\n", b" \n"])))
    text = b"".join(pieces)
    return rows, text.removesuffix(b"\n") if rows and draw(st.booleans()) else text


@QUIET
@given(documents(), st.integers(1, 7), st.sampled_from(sorted(COMPRESSORS)))
def test_rows_are_the_same_whatever_units_and_compression(
    tmp_path: Path, document: tuple[list[Any], bytes], rows_per_unit: int, compressor: str
) -> None:
    rows, text = document
    path = tmp_path / "data.jsonl"
    path.write_bytes(COMPRESSORS[compressor](text))
    found = read_all(path, rows_per_unit=rows_per_unit)
    names = found.plan.schema.names
    good = [row for row in found.rows if row.failure is None]
    assert all(row.failure.fault == RowFault.INPUT_SCHEMA for row in found.rows if row.failure)
    assert len(found.rows) == len(rows)
    by_id = {row.row_id: dict(row.columns) for row in good}
    for i, expected in enumerate(rows):
        if f"0:{i}" in by_id:
            assert by_id[f"0:{i}"] == {name: expected.get(name) for name in names}


@QUIET
@given(documents())
def test_what_is_carried_is_what_stood_there(tmp_path: Path, document: tuple[list[Any], bytes]) -> None:
    rows, text = document
    (tmp_path / "data.jsonl").write_bytes(text)
    found = read_all(tmp_path / "data.jsonl")
    carried_rows = found.table.to_pylist() if found.table.num_columns else [{} for _ in rows]
    for row, carried in zip(found.rows, carried_rows, strict=True):
        for name, value in row.columns.items():
            assert stands_for(carried[name], value)


def stands_for(stored: Any, value: Any) -> bool:
    """Whether ``stored`` is ``value``, or JSON text of it at any depth."""
    if isinstance(stored, list) and isinstance(value, list):
        return all(stands_for(*pair) for pair in zip(stored, value, strict=True))
    if isinstance(stored, dict):
        return stored.keys() == value.keys() and all(stands_for(stored[key], value[key]) for key in value)
    return bool(stored == value or (isinstance(stored, str) and json.loads(stored) == value))


BAD_LINES = {
    "not JSON": (b'{"a": ', RowFault.INPUT_JSON, "column"),
    "key twice": (b'{"a": 1, "a": 2}', RowFault.INPUT_JSON, "'a' stands twice"),
    "key twice inside": (b'{"a": {"b": 1, "b": 2}}', RowFault.INPUT_JSON, "'b' stands twice"),
    "NaN": (b'{"a": NaN}', RowFault.INPUT_JSON, "NaN"),
    "infinity": (b'{"a": -Infinity}', RowFault.INPUT_JSON, "-Infinity"),
    "huge float": (b'{"a": 1e999}', RowFault.INPUT_JSON, "1e999"),
    "huge integer": (b'{"a": 18446744073709551616}', RowFault.INPUT_JSON, "64 bits"),
    "very huge integer": (b'{"a": ' + b"9" * 100_000 + b"}", RowFault.INPUT_JSON, "64 bits"),
    "array": (b"[1]", RowFault.INPUT_JSON, "found array"),
    "string": (b'"a"', RowFault.INPUT_JSON, "found string"),
    "two objects": (b'{"a": 1} {"a": 2}', RowFault.INPUT_JSON, "Extra data"),
    "nested 101": (b'{"a":' + b"[" * 100 + b"]" * 100 + b"}", RowFault.INPUT_JSON, "deeper than 100"),
    "nested 100000": (b'{"a":' + b"[" * 100_000, RowFault.INPUT_JSON, "deeper than 100"),
    "invalid UTF-8": (b'{"a": "\xff"}', RowFault.INPUT_UTF8, "byte 7"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', RowFault.INPUT_UTF8, "byte 7"),
    "lone surrogate": (b'{"a": "\\ud800"}', RowFault.INPUT_UNICODE, "\\ud800"),
    "lone surrogate key": (b'{"\\uDC00": "a"}', RowFault.INPUT_UNICODE, "\\udc00"),
    "control character": (b'{"a": "\x01"}', RowFault.INPUT_JSON, "control character"),
    "form feed only": (b"\x0c", RowFault.INPUT_JSON, "column 1"),
    "BOM after line 1": (b'\xef\xbb\xbf{"a": 1}', RowFault.INPUT_JSON, "column 1"),
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=str)
def test_a_bad_line_is_one_failed_row(tmp_path: Path, bad: str) -> None:
    line, fault, said = BAD_LINES[bad]
    (tmp_path / "data.jsonl").write_bytes(b'{"x": "before"}\n\n' + line + b'\n{"x": "after"}\n')
    found = read_all(tmp_path)
    assert found.records == [{"x": "before"}, {}, {"x": "after"}]
    assert found.table.to_pylist() == [{"x": "before"}, {"x": None}, {"x": "after"}]
    failure = found.rows[1].failure
    assert failure is not None
    assert (failure.fault, failure.stage) == (fault, Stage.READ)
    assert failure.message.startswith("data.jsonl, line 3: ")
    assert said in failure.message
    assert len(failure.message) <= 2000
    assert "Traceback" not in failure.message


@pytest.mark.parametrize("compressor", sorted(COMPRESSORS))
def test_gb18030_is_read_when_it_is_asked_for(tmp_path: Path, compressor: str) -> None:
    """Its second bytes may look like a backslash, never like a line end; half a character fails alone."""
    texts = ["评论很好", '\\"引号"', "镕 㐀 𠀀 € é", "珅\\|乗", "a\u2028b"]
    lines = [json.dumps({"t": text}, ensure_ascii=False).encode("gb18030") for text in texts]
    bad = b'{"t": "\xc6"}'
    (tmp_path / "a.jsonl").write_bytes(
        COMPRESSORS[compressor]("\ufeff".encode("gb18030") + b"\r\n".join([*lines, bad]))
    )
    found = read_all(tmp_path, encoding="gb18030", rows_per_unit=2)
    assert [row.columns.get("t") for row in found.rows] == [*texts, None]
    assert found.table["t"].to_pylist() == [*texts, None]
    assert found.failures[5].fault == RowFault.INPUT_UTF8
    assert "invalid GB18030 at byte 7" in found.failures[5].message
    as_utf8 = read_all(tmp_path)
    assert "input.encoding" in as_utf8.failures[1].message
    assert as_utf8.plan.digest != found.plan.digest or as_utf8.rows != found.rows


def test_many_tiny_rows_take_little_memory(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a":1}\n' * 100_000)
    spec = InputSpec(path=str(tmp_path))
    tracemalloc.start()
    plan = make_plan(spec)
    with UnitReader(plan.files, plan.schema, spec) as reader:
        for unit in plan.units[:20]:
            assert len(reader.read(unit).rows) == 256
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.num_rows == 100_000
    assert peak_bytes < 12 << 20


def test_nesting_of_100_and_a_whole_surrogate_pair_are_fine(tmp_path: Path) -> None:
    nested = '{"a":' + "[" * 99 + "]" * 99 + ', "b": "\\ud83d\\ude00"}'
    (tmp_path / "data.jsonl").write_text(nested)
    found = read_all(tmp_path)
    assert not found.failures
    assert found.records[0]["b"] == "😀"


def test_the_line_number_counts_blank_lines_in_every_unit(tmp_path: Path) -> None:
    lines = ['{"x": 1}', "", "bad", "", "", '{"x": 2}', "bad", "", "bad"]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    for rows_per_unit in (1, 2, 10):
        found = read_all(tmp_path, rows_per_unit=rows_per_unit)
        places = [failure.message.split(":")[0] for failure in found.failures.values()]
        assert places == ["data.jsonl, line 3", "data.jsonl, line 7", "data.jsonl, line 9"]
        assert found.plan.num_blank == 4


@pytest.mark.parametrize("compressor", sorted(COMPRESSORS))
def test_an_overlong_line_is_a_failed_row_in_bounded_memory(tmp_path: Path, compressor: str) -> None:
    long_line = b'{"x": "' + b"spam" * (12 << 18) + b'"}'
    text = b'{"x": "a"}\n' + long_line + b'\r\n{"x": "b"}'
    (tmp_path / "data.jsonl").write_bytes(COMPRESSORS[compressor](text))
    tracemalloc.start()
    found = read_all(tmp_path, max_record_bytes=1 << 20)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.failures[1].fault == RowFault.INPUT_TOO_LARGE
    assert "max_record_bytes" in found.failures[1].message
    assert found.rows[1].row_hash == xxhash.xxh128_digest(long_line)
    assert [row.columns.get("x") for row in found.rows] == ["a", None, "b"]
    assert peak_bytes < 8 << 20


@pytest.mark.parametrize("slack", [-1, 0, 1])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""])
def test_a_record_may_be_just_as_long_as_allowed(tmp_path: Path, slack: int, ending: bytes) -> None:
    record = b'{"x": "0123456789"}'
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + record + ending)
    found = read_all(tmp_path, max_record_bytes=len(record) + slack)
    assert bool(found.failures) == (slack < 0)


def test_the_hash_is_of_the_line_without_its_ending(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"x": 1}\r\n{"x":1}\n{"x": 1}')
    hashes = [row.row_hash for row in read_all(tmp_path).rows]
    assert hashes[0] == hashes[2] == xxhash.xxh128_digest(b'{"x": 1}')
    assert hashes[1] == xxhash.xxh128_digest(b'{"x":1}')


CORRUPT = {
    "truncated gzip": lambda text: gzip.compress(text)[:-20],
    "no gzip trailer": lambda text: gzip.compress(text)[:-8],
    "wrong gzip CRC": lambda text: gzip.compress(text)[:-8] + b"abcd" + gzip.compress(text)[-4:],
    "garbage after gzip": lambda text: gzip.compress(text) + b"garbage",
    "gzip header only": lambda text: gzip.compress(text)[:10],
    "truncated zstd": lambda text: pa.compress(text, codec="zstd", asbytes=True)[:-4],
    "truncated second zstd frame": lambda text: (pa.compress(text, codec="zstd", asbytes=True) * 2)[:-4],
    "garbage after zstd": lambda text: pa.compress(text, codec="zstd", asbytes=True) + b"garbage",
}


@pytest.mark.parametrize("how", CORRUPT)
def test_a_corrupt_file_is_refused_by_name(tmp_path: Path, how: str) -> None:
    text = b"".join(b'{"x": %d}\n' % i for i in range(10_000))
    (tmp_path / "data.jsonl").write_bytes(CORRUPT[how](text))
    with pytest.raises(InputError, match=r"data\.jsonl: ") as caught:
        read_all(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b" " * (80 << 20)))
    with pytest.raises(InputError, match=r"data\.jsonl\.gz: .* expand to more than"):
        read_all(tmp_path)


def test_reading_units_out_of_order_gives_the_same_rows(tmp_path: Path) -> None:
    text = b"".join(b'{"x": %d}\n' % i for i in range(100))
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(text))
    (tmp_path / "b.jsonl").write_bytes(text)
    spec = InputSpec(path=str(tmp_path), rows_per_unit=7)
    plan = make_plan(spec)
    forward = {row.row_id: row for row in read_all(tmp_path, rows_per_unit=7).rows}
    with UnitReader(plan.files, plan.schema, spec) as reader:
        for unit in reversed(plan.units):
            for row in reader.read(unit).rows:
                assert row == forward.pop(row.row_id)
    assert not forward


@pytest.mark.shared
def test_every_document_of_the_json_test_suite(tmp_path: Path, shared_dir: Path) -> None:
    """Accepted where it must be, a failed row where it must not parse, the rows around it untouched."""
    suite = sorted((shared_dir / "data/bad/JSONTestSuite/test_parsing").glob("*.json"))
    documents = {path.name: path.read_bytes() for path in suite}
    one_line = {name: text for name, text in documents.items() if b"\n" not in text.rstrip(b"\r\n")}
    one_line = {name: text.rstrip(b"\r\n") for name, text in one_line.items() if text.strip(b" \t\r\n")}
    assert len(one_line) > 280
    good = b'{"good": true}\n'
    (tmp_path / "data.jsonl").write_bytes(good + b"".join(text + b"\n" + good for text in one_line.values()))
    found = read_all(tmp_path)
    assert len(found.rows) == 2 * len(one_line) + 1
    assert all(row.columns["good"] is True for row in found.rows[::2])
    for name, row in zip(one_line, found.rows[1::2], strict=True):
        if name.startswith("n_"):
            assert row.failure is not None, name
        elif name.startswith("y_") and one_line[name].strip().startswith(b"{"):
            assert row.failure is None or "stands twice" in row.failure.message, name
        elif not one_line[name].strip().startswith(b"{"):
            assert row.failure is not None, name


@pytest.mark.shared
def test_documents_of_several_lines_are_rows_too(tmp_path: Path, shared_dir: Path) -> None:
    for path in (shared_dir / "data/bad/JSONTestSuite/test_parsing").glob("*.json"):
        (tmp_path / "data.jsonl").write_bytes(path.read_bytes())
        read_all(tmp_path, format="jsonl")


@pytest.mark.shared
def test_invalid_utf8_fails_its_own_row(tmp_path: Path, shared_dir: Path) -> None:
    cases = (shared_dir / "data/bad/utf8tests/utf8tests.bin").read_bytes().split(b"\n")
    parts = [case.split(b":", 2) for case in cases if case.count(b":") >= 2]
    escaped = [(kind == b"invalid", text.replace(b"\0", b"\\u0000")) for _, kind, text in parts]
    lines = [(invalid, b'{"t": "' + text + b'"}') for invalid, text in escaped]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(line for _, line in lines))
    found = read_all(tmp_path)
    failed = [row.failure is not None for row in found.rows]
    assert failed == [invalid for invalid, _ in lines]
    assert sum(failed) > 100
    assert {failure.fault for failure in found.failures.values()} == {RowFault.INPUT_UTF8}
