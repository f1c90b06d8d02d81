from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.errors import DriftError
from b2batch.outputs.drift import check_drift, diff_values
from b2batch.outputs.record import RunRecord

from .tiny_run import make_record, make_spec, make_units

UNITS = make_units()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def drift(found: RunRecord, wanted: RunRecord) -> list[str]:
    """The lines that name what differs."""
    with pytest.raises(DriftError) as raised:
        check_drift(found, wanted, "out")
    assert raised.value.exit_code == 4
    assert "--overwrite" in str(raised.value)
    assert "another output.path" in str(raised.value)
    return [line.strip() for line in str(raised.value).splitlines() if line.startswith("  ")]


def file(path: str, size: int = 5, sha256: str = "aa" * 32, etag: str = "1") -> dict[str, Any]:
    return {"path": path, "size": size, "etag": etag, "fingerprint": f"sha256:{sha256}"}


def test_same_run() -> None:
    check_drift(make_record(make_spec(), UNITS), make_record(make_spec(), UNITS), "out")


def test_each_setting_on_its_line() -> None:
    found = make_record(make_spec(), UNITS)
    wanted = make_record(make_spec("sampling.temperature=0.7", "sampling.stop=[a]"), UNITS)
    assert drift(found, wanted) == ['sampling.stop: [] -> ["a"]', "sampling.temperature: 0.0 -> 0.7"]


def test_other_weights() -> None:
    lines = drift(make_record(make_spec(), UNITS), make_record(make_spec(), UNITS, model_digest="tuned"))
    assert lines == ['model_digest: "weights" -> "tuned"']


def test_files_changed_removed_and_added() -> None:
    found = make_record(make_spec(), UNITS, files=[file("a"), file("b"), file("c")])
    wanted = make_record(make_spec(), UNITS, files=[file("a"), file("b", 6, "bb" * 32), file("d")])
    assert drift(found, wanted) == [
        "input file b: 5 bytes, sha256 aaaaaaaaaaaa -> 6 bytes, sha256 bbbbbbbbbbbb",
        "input file c: 5 bytes, sha256 aaaaaaaaaaaa -> (absent)",
        "input file d: (absent) -> 5 bytes, sha256 aaaaaaaaaaaa",
    ]


def test_a_file_that_was_only_touched_is_not_listed() -> None:
    found = make_record(make_spec(), UNITS, files=[file("a"), file("b")])
    wanted = make_record(make_spec(), UNITS, files=[file("a", etag="2"), file("b", sha256="bb" * 32)])
    assert drift(found, wanted) == [
        "input file b: 5 bytes, sha256 aaaaaaaaaaaa -> 5 bytes, sha256 bbbbbbbbbbbb"
    ]


def test_reading_settings_when_the_files_are_the_same() -> None:
    lines = drift(make_record(make_spec(), UNITS), make_record(make_spec("input.limit=3"), UNITS))
    assert lines == ["input.limit: null -> 3"]


def test_other_units_of_the_same_files() -> None:
    (line,) = drift(make_record(make_spec(), UNITS), make_record(make_spec(), make_units(5)))
    assert line.startswith("plan: 4 units, digest ")


def test_many_differences_are_cut() -> None:
    many = [file(f"f{number:03d}") for number in range(100)]
    lines = drift(make_record(make_spec(), UNITS, files=[]), make_record(make_spec(), UNITS, files=many))
    assert len(lines) == 21
    assert lines[-1] == "… and 80 more"


@pytest.mark.parametrize(
    "override",
    ["cluster.replicas=3", "engine.max_num_seqs=4", "errors.max_error_rate=0.5", "model.dtype=float32"],
)
def test_settings_that_do_not_decide_the_result_are_the_same_run(override: str) -> None:
    assert make_record(make_spec(override), UNITS).run_id == make_record(make_spec(), UNITS).run_id


def test_no_credentials_in_the_record() -> None:
    spec = make_spec(
        "input.path=s3://canary@bucket/x?region=eu",
        "model.model=https://canary@host/m",
    )
    record = make_record(
        spec, UNITS, provenance={"index": "https://canary@host/x?secret_key=canary&region=eu"}
    )
    assert "canary" not in repr(record)
    assert "***@host/x?secret_key=***&region=eu" in repr(record)


@given(JSON, JSON)
def test_values_differ_exactly_when_a_line_is_shown(old: Any, new: Any) -> None:
    assert (list(diff_values({"a": old}, {"a": new})) == []) == (repr(old) == repr(new) or _same(old, new))


def _same(old: Any, new: Any) -> bool:
    """Equal as JSON, where 1 and true are two things and key order is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return type(old) is type(new) and bool(old == new)
