from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.errors import DriftError, InputError, IntegrityError, RowFault, Stage
from b2batch.inputs.plan import Plan, Units, limit_spans, make_plan
from b2batch.inputs.unit import TOKEN_WEIGHT, UnitCutter
from b2batch.inputs.unit_reader import UnitReader
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec

from .reading import read_all


def write(path: Path, num_rows: int, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f'{{"n": {first + i}}}\n' for i in range(num_rows)))
    return path


def plan_of(path: Path | str, **settings: object) -> Plan:
    return make_plan(InputSpec(path=str(path), **settings))  # type: ignore[arg-type]


# --- units -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 60))),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(1, 100),
)
def test_units_hold_every_row_once_in_order(
    lines: list[tuple[bool, int]], rows_per_unit: int, answer_tokens: int, unit_weight: int
) -> None:
    cutter = UnitCutter(rows_per_unit, answer_tokens, unit_weight)
    position, blanks, rows = 0, 0, []
    for is_blank, size in lines:
        if is_blank:
            cutter.add_blank()
            blanks += 1
        else:
            cutter.add_row(position, position + size)
            rows.append((position, position + size, blanks))
        position += size
    spans = cutter.spans().tolist()
    assert cutter.num_rows == len(rows) == sum(num_rows for _, num_rows, *_ in spans)
    for _, num_rows, start, stop, num_blank_before in spans:
        mine, rows = rows[:num_rows], rows[num_rows:]
        assert (start, stop, num_blank_before) == (mine[0][0], mine[-1][1], mine[0][2])
        weight = stop - start + num_rows * answer_tokens * TOKEN_WEIGHT
        assert num_rows == 1 or (num_rows <= rows_per_unit and weight <= unit_weight)


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 30))
def test_a_limit_keeps_the_first_rows(sizes: list[int], limit: int) -> None:
    spans = np.array([[0, size, 0, 0, 0] for size in sizes], np.int64).reshape(-1, 5)
    kept = limit_spans(spans, limit)[:, 1].tolist()
    assert sum(kept) == min(limit, sum(sizes))
    assert kept[:-1] == sizes[: len(kept)][:-1]
    assert all(kept)


@pytest.mark.parametrize(
    ("answer_tokens", "sizes"),
    [(0, [256, 144]), (400, [256, 144]), (1024, [127, 127, 127, 19]), (200_000, [1] * 400)],
)
def test_a_unit_is_bounded_in_tokens_to_generate(
    tmp_path: Path, answer_tokens: int, sizes: list[int]
) -> None:
    write(tmp_path / "a.jsonl", 400)
    pq.write_table(pa.table({"n": range(400)}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        plan = make_plan(InputSpec(path=(str(tmp_path / name),)), answer_tokens)
        assert [unit.num_rows for unit in plan.units] == sizes


def test_a_unit_is_bounded_in_bytes_too(tmp_path: Path) -> None:
    text = "x" * (3 << 18)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": text}) + "\n" for _ in range(5)))
    assert [unit.num_rows for unit in plan_of(tmp_path).units] == [2, 2, 1]
    pq.write_table(
        pa.table({"t": [text + str(i) for i in range(5)]}), tmp_path / "b.parquet", compression="none"
    )
    assert [unit.num_rows for unit in plan_of(tmp_path / "b.parquet").units] == [2, 2, 1]


def test_units_are_numbered_over_all_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 5)
    write(tmp_path / "b.jsonl", 3)
    units = plan_of(tmp_path, rows_per_unit=2).units
    assert [unit.index for unit in units] == [0, 1, 2, 3, 4]
    assert [(unit.file_index, unit.first_row, unit.num_rows) for unit in units] == [
        (0, 0, 2),
        (0, 2, 2),
        (0, 4, 1),
        (1, 0, 2),
        (1, 2, 1),
    ]
    assert units[-1] == units[4]
    assert list(units[1:3]) == [units[1], units[2]]


@pytest.mark.parametrize("limit", [1, 4, 5, 6, 8, 100])
def test_limit_takes_the_first_rows_of_the_plan(tmp_path: Path, limit: int) -> None:
    write(tmp_path / "a.jsonl", 5)
    pq.write_table(pa.table({"n": [5, 6, 7]}), tmp_path / "b.parquet")
    found = read_all(tmp_path, limit=limit, rows_per_unit=2)
    assert [row.columns["n"] for row in found.rows] == list(range(8))[:limit]
    assert found.plan.num_rows == min(limit, 8)
    assert len(found.plan.files) == (1 if limit <= 5 else 2)


# --- which files -----------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ["b.jsonl", "a/x.jsonl", "a/b/y.jsonl", "Z.jsonl", "é.jsonl", "a b[1].jsonl"]:
        write(tmp_path / name, 1)
    for name in ["_SUCCESS", ".hidden.jsonl", "__b2batch/run.json", "a/_tmp/x.jsonl", "a/.b/x.jsonl"]:
        write(tmp_path / name, 1)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        ([""], ["Z.jsonl", "a b[1].jsonl", "a/b/y.jsonl", "a/x.jsonl", "b.jsonl", "é.jsonl"]),
        (["*.jsonl"], ["Z.jsonl", "a b[1].jsonl", "b.jsonl", "é.jsonl"]),
        (["[bZ].jsonl"], ["Z.jsonl", "b.jsonl"]),
        (["[!b].jsonl"], ["Z.jsonl", "é.jsonl"]),
        (["?.jsonl"], ["Z.jsonl", "b.jsonl", "é.jsonl"]),
        (["*/*.jsonl"], ["a/x.jsonl"]),
        (["**/*.jsonl"], ["Z.jsonl", "a b[1].jsonl", "a/b/y.jsonl", "a/x.jsonl", "b.jsonl", "é.jsonl"]),
        (["a/**/y.jsonl"], ["b/y.jsonl"]),
        ([".*.jsonl"], [".hidden.jsonl"]),
        (["a/_tmp"], ["x.jsonl"]),
        (["a b[1].jsonl"], ["a b[1].jsonl"]),
        (["b.jsonl"], ["b.jsonl"]),
        (["a", "b.jsonl", "a/x.jsonl"], ["a/b/y.jsonl", "a/x.jsonl", "b.jsonl"]),
    ],
)
def test_which_files_a_path_names(tree: Path, patterns: list[str], paths: list[str]) -> None:
    plan = make_plan(InputSpec(path=[str(tree / pattern) for pattern in patterns]))
    assert [file.path for file in plan.files] == paths
    assert plan.num_rows == len(paths)


def test_a_uri_and_a_path_name_the_same_files(tree: Path) -> None:
    by_uri = plan_of(f"file://{tree}/**/*.jsonl")
    assert by_uri.digest == plan_of(f"{tree}/**/*.jsonl").digest


def test_files_in_a_store_behind_fsspec(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe(
        {"/bucket/in/a.jsonl": b'{"n": 1}\n', "/bucket/in/sub/b.jsonl.gz": gzip.compress(b'{"n": 2}\n')}
    )
    for path in ["memory://bucket/in", "memory://bucket/in/**/*.jsonl*"]:
        found = read_all(path)
        assert [file.path for file in found.plan.files] == ["a.jsonl", "sub/b.jsonl.gz"]
        assert found.records == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("file://{}", "${{env:B2_TEST_STORE}}/in/*.jsonl"),
        ("{}", "${{env:B2_TEST_STORE}}/in/*.jsonl"),
        ("{}", "${{env:B2_TEST_STORE}}/in/a.jsonl"),
        ("{}", "${{env:B2_TEST_STORE}}"),
        ("{}/in", "${{env:B2_TEST_STORE}}"),
        ("secret", "{}/../secret/${{env:B2_TEST_STORE}}/../in"),
        ("in", "${{env:B2_TEST_STORE}}/*"),
    ],
)
def test_an_environment_reference_is_not_resolved_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, path: str
) -> None:
    secret = tmp_path / "secret"
    write(secret / "in" / "a.jsonl", 1)
    (secret / "secret").mkdir()
    monkeypatch.chdir(secret)
    monkeypatch.setenv("B2_TEST_STORE", value.format(secret))
    found = read_all(path.format(secret))
    assert len(found.rows) == 1
    if value != "in" and not path.startswith("{"):  # there the job file itself says where, or the directory
        assert str(secret).encode() not in found.plan.to_bytes()


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/", "*.nothing", "empty"])
def test_a_path_that_gives_no_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"input\.path: .*" + name.replace("*", r"\*").rstrip("/")):
        plan_of(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"PK\x03\x04....", b"\xff\xfe{\x00", b"[\n1]", b"\x89PNG\r\n"]
)
def test_an_unknown_format_is_refused_with_what_is_allowed(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.jsonl", 1)
    (tmp_path / "b.dat").write_bytes(content)
    with pytest.raises(InputError, match=r"b\.dat: .*JSON Lines .* and Parquet"):
        plan_of(tmp_path)


def test_the_content_says_the_format_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(gzip.compress(b'{"n": 1}\n'))
    pq.write_table(pa.table({"n": [2]}), tmp_path / "b.jsonl.gz")
    assert [row["n"] for row in read_all(tmp_path).records] == [1, 2]


def test_zero_rows_are_a_valid_plan(tmp_path: Path) -> None:
    for name, content in {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n \r\n\n",
        "empty.jsonl.gz": gzip.compress(b""),
    }.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"n": pa.array([], pa.int64())}), tmp_path / "none.parquet")
    plan = plan_of(tmp_path)
    assert (len(plan.files), len(plan.units), plan.num_rows, plan.num_blank) == (4, 0, 0, 3)
    assert plan.schema == pa.schema([("n", pa.int64())])
    assert len(plan_of(tmp_path / "empty.jsonl").schema) == 0
    assert Plan.from_bytes(plan.to_bytes()).digest == plan.digest


# --- identity --------------------------------------------------------------------------------------


def test_the_digest_is_of_the_content_not_of_place_or_time(tmp_path: Path) -> None:
    for place in ("one", "two/deeper"):
        write(tmp_path / place / "in/a.jsonl", 10)
        write(tmp_path / place / "in/b.jsonl", 10)
    os.utime(tmp_path / "one/in/a.jsonl", (1, 1))
    digest = plan_of(tmp_path / "one/in").digest
    assert digest == plan_of(tmp_path / "two/deeper/in").digest
    assert digest == plan_of(f"{tmp_path}/one/in/*.jsonl").digest
    # Pinned: another digest for the same content would make every unfinished run of a user a drift.
    assert digest == "4919319638fc4b97d15c1c898ae7f3427c1f6e0a95c84fc9ec357fd91cb00944"


@pytest.mark.parametrize("change", ["value", "order", "name", "more", "units", "limit"])
def test_the_digest_tells_contents_apart(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", 10)
    before = plan_of(tmp_path).digest
    settings: dict[str, object] = {}
    if change == "value":
        path.write_text(path.read_text().replace("5", "6"))
    elif change == "order":
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    elif change == "name":
        path.rename(tmp_path / "b.jsonl")
    elif change == "more":
        write(tmp_path / "b.jsonl", 1)
    else:
        settings = {"units": {"rows_per_unit": 3}, "limit": {"limit": 9}}[change]
    assert plan_of(tmp_path, **settings).digest != before


def test_a_fast_fingerprint_sees_time_and_both_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 10)
    plan = plan_of(path, fingerprint="fast")
    assert plan.files[0].fingerprint.startswith("fast:")
    assert plan_of(path, fingerprint="fast").digest == plan.digest
    os.utime(path, (1, 1))
    assert plan_of(path, fingerprint="fast").digest != plan.digest


def test_a_plan_survives_its_bytes(tmp_path: Path) -> None:
    rows = [{"n": 1, "j": 1, "l": [{"a": None}]}, {"n": 2, "j": "x", "l": []}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    plan = plan_of(tmp_path, rows_per_unit=1)
    again = Plan.from_bytes(plan.to_bytes())
    assert again.files == plan.files
    assert list(again.units) == list(plan.units)
    assert again.schema.equals(plan.schema, check_metadata=True)
    assert again.digest == plan.digest
    assert again.to_bytes() == plan.to_bytes()


def test_stored_bytes_that_are_no_plan_are_refused(tmp_path: Path) -> None:
    data = plan_of(write(tmp_path / "a.jsonl", 100), rows_per_unit=1).to_bytes()
    for corrupt in (b"", data[:-10], data[:60] + bytes([data[60] ^ 1]) + data[61:]):
        with pytest.raises(IntegrityError, match="the stored plan"):
            Plan.from_bytes(corrupt)


def test_a_million_units_are_cheap(tmp_path: Path) -> None:
    fields = np.zeros((1_000_000, 6), np.int64)
    fields[:, 2] = 3
    one = plan_of(write(tmp_path / "a.jsonl", 1))
    units = Units(fields)
    begin = time.monotonic()
    data = Plan(one.files, units, one.schema, "").to_bytes()
    assert units.num_rows == 3_000_000
    assert units[999_999] == WorkUnit(999_999, 0, 0, 3, 0, 0)
    assert len(data) < 10 << 20
    assert time.monotonic() - begin < 5


def replace_in_place(path: Path) -> None:
    """Other rows in a file of the same size and time, as ``cp -p`` of another version leaves them."""
    times = path.stat()
    text = path.read_text().replace("5", "6")
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("fingerprint", ["full", "fast"])
@pytest.mark.parametrize("change", ["size", "content", "replaced", "gone"])
def test_a_file_that_changes_during_the_run_is_drift(tmp_path: Path, change: str, fingerprint: str) -> None:
    path = write(tmp_path / "a.jsonl", 10)
    spec = InputSpec(path=str(path), rows_per_unit=2, fingerprint=fingerprint)
    plan = make_plan(spec)
    with UnitReader(plan.files, plan.schema, spec) as reader:
        reader.read(plan.units[0])
        if change == "size":
            write(path, 11)
        elif change == "content":
            path.write_text(path.read_text().replace("5", "6"))
        elif change == "replaced":
            replace_in_place(path)
        else:
            path.unlink()
        with pytest.raises(DriftError, match=r"a\.jsonl: the input changed during the run"):
            reader.read(plan.units[1])


@pytest.mark.parametrize("change", ["touched", "linked", "mode"])
def test_a_file_with_the_same_content_is_the_same_file(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", 10)
    spec = InputSpec(path=str(path), rows_per_unit=2)
    plan = make_plan(spec)
    if change == "touched":
        os.utime(path, (1, 1))
    elif change == "linked":
        os.link(path, tmp_path / "b")
    else:
        path.chmod(0o400)
    with UnitReader(plan.files, plan.schema, spec) as reader:
        rows = [row.columns["n"] for unit in plan.units for row in reader.read(unit).rows]
    assert rows == list(range(10))


@pytest.mark.parametrize("tag", ["ETag", "etag"])
def test_an_object_store_says_the_version_itself(
    tmp_path: Path, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One second is how exact its times are: the tag tells two writes within it apart."""
    store = fsspec.filesystem("memory")
    told = type(store).info
    monkeypatch.setattr(
        type(store),
        "info",
        lambda self, path, **more: {**told(self, path, **more), tag: self.cat(path).hex()},
    )
    store.pipe("/versions/a.jsonl", b'{"n": 1}\n')
    created = store.store["/versions/a.jsonl"].modified
    spec = InputSpec(path="memory://versions/a.jsonl")
    plan = make_plan(spec)
    store.pipe("/versions/a.jsonl", b'{"n": 2}\n')
    store.store["/versions/a.jsonl"].modified = created
    with (
        UnitReader(plan.files, plan.schema, spec) as reader,
        pytest.raises(DriftError, match="written since"),
    ):
        reader.read(plan.units[0])


# --- files that cannot be read ---------------------------------------------------------------------


def parquet_with_a_bad_page(path: Path) -> None:
    table = pa.table({"n": range(100), "t": [f"text {i:03}" for i in range(100)]})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_page_checksum=True, row_group_size=50
    )
    path.write_bytes(path.read_bytes().replace(b"text 075", b"text 07p"))


def bad_file(path: Path, how: str) -> None:
    good = gzip.compress(b'{"n": 1}\n' * 1000)
    pq.write_table(pa.table({"n": range(100)}), path)
    footer_cut = path.read_bytes()[:-20]
    contents = {
        "truncated gzip": good[:-20],
        "wrong CRC": good[:-8] + b"abcd" + good[-4:],
        "truncated zstd": pa.compress(b'{"n": 1}\n' * 1000, "zstd", asbytes=True)[:-4],
        "bomb": gzip.compress(b" " * (80 << 20)),
        "zstd bomb": pa.compress(b" " * (80 << 20), "zstd", asbytes=True),
        "footer": footer_cut,
        "image": b"\x89PNG\r\n",
        "parquet by name": b"PAR1",
    }
    path.write_bytes(contents[how])


BAD_FILES = (
    "truncated gzip",
    "wrong CRC",
    "truncated zstd",
    "bomb",
    "zstd bomb",
    "footer",
    "image",
    "parquet by name",
)


@pytest.mark.parametrize("how", BAD_FILES)
def test_a_bad_file_ends_the_plan_or_is_one_error_row(tmp_path: Path, how: str) -> None:
    write(tmp_path / "a.jsonl", 2)
    bad_file(tmp_path / "b.dat", how)
    write(tmp_path / "c.jsonl", 2, first=2)
    with pytest.raises(InputError, match=r"b\.dat: .*input\.on_bad_file"):
        plan_of(tmp_path)
    found = read_all(tmp_path, on_bad_file="skip")
    assert [row.columns.get("n") for row in found.rows] == [0, 1, None, 2, 3]
    assert found.table["n"].to_pylist() == [0, 1, None, 2, 3]
    failure = found.failures[2]
    assert (failure.fault, failure.stage) == (RowFault.FILE, Stage.READ)
    assert "b.dat: " in failure.message
    assert found.plan.digest == Plan.from_bytes(found.plan.to_bytes()).digest
    bad_file(tmp_path / "b.dat", "image" if how != "image" else "footer")
    assert plan_of(tmp_path, on_bad_file="skip").digest != found.plan.digest, "another file is another plan"


def test_a_page_that_the_plan_did_not_see_fails_the_rows_of_its_units(tmp_path: Path) -> None:
    parquet_with_a_bad_page(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: .*checksum"):
        read_all(tmp_path, rows_per_unit=10)
    found = read_all(tmp_path, rows_per_unit=10, on_bad_file="skip")
    good = [row.columns["n"] for row in found.rows if row.failure is None]
    assert set(range(50)) <= set(good)
    assert {failure.fault for failure in found.failures.values()} == {RowFault.FILE}
    assert 75 in found.failures
    assert len(found.rows) == 100


def test_a_path_without_a_file_is_a_fault_of_the_job_in_any_case(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        plan_of(tmp_path / "missing.jsonl", on_bad_file="skip")


def test_credentials_in_a_uri_are_masked_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B2_TEST_KEY", "canary/with+slash")
    for path in ("memory://canary@x/missing.jsonl", "memory://user:${env:B2_TEST_KEY}@x/missing.jsonl"):
        with pytest.raises(InputError, match=r"missing\.jsonl") as caught:
            plan_of(path)
        assert "canary" not in str(caught.value)


@pytest.mark.shared
def test_a_real_dataset_in_every_compression(tmp_path: Path, shared_dir: Path) -> None:
    text = (shared_dir / "data/reviews_test.jsonl").read_bytes()
    expected = [json.loads(line) for line in text.splitlines()]
    for suffix, data in {
        "": text,
        ".gz": gzip.compress(text),
        ".zst": pa.compress(text, "zstd", asbytes=True),
    }.items():
        (tmp_path / f"a.jsonl{suffix}").write_bytes(data)
        found = read_all(tmp_path / f"a.jsonl{suffix}")
        assert found.records == expected
        assert found.table.to_pylist() == expected
