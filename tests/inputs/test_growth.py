"""A plan that grows: whatever happens to the files, each row that is there stands in it once."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from b2batch.errors import DriftError, InputError, NothingToDo
from b2batch.inputs.growth import Growth, grow_plan
from b2batch.inputs.plan import Plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.rows import PromptRow
from b2batch.spec import InputSpec


def make_spec(path: Path, **keys: Any) -> InputSpec:
    return InputSpec.model_validate({"path": str(path), "rows_per_unit": 3, "incremental": True, **keys})


class Held:
    """What an output would keep between two runs."""

    def __init__(self, spec: InputSpec) -> None:
        self.spec = spec
        self.plan: Plan | None = None
        self.keys: list[bytes] = []

    def grow(self, tick: str = "") -> Growth | None:
        growth = grow_plan(self.spec, 0, tick, self.plan, lambda: self.keys)
        if growth is not None:
            self.plan = Plan.from_bytes(growth.plan.to_bytes())
            self.keys += [growth.keys] if growth.keys else []
        return growth

    def rows(self) -> list[PromptRow]:
        assert self.plan is not None
        with UnitReader(self.plan.files, self.plan.schema, self.spec) as reader:
            return [row for unit in self.plan.units for row in reader.read(unit).rows]

    def texts(self) -> Counter[str]:
        return Counter(row.columns["text"] for row in self.rows())


def write(path: Path, texts: Iterable[str], mode: str = "w", **columns: Any) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, **columns}) + "\n" for text in texts)


class GrowingInput(RuleBasedStateMachine):
    """Files come, grow, change, go and are touched; the plan is compared with what it must hold."""

    @initialize(fingerprint=st.sampled_from(["full", "fast"]))
    def begin(self, fingerprint: str) -> None:
        import tempfile

        self.directory = Path(tempfile.mkdtemp())
        self.held = Held(make_spec(self.directory, on_changed="reprocess", fingerprint=fingerprint))
        self.files: dict[str, list[str]] = {}
        self.gone: list[str] = []
        self.planned: dict[str, list[str]] = {}
        self.number = 0

    def texts(self, number: int) -> list[str]:
        self.number += number
        return [f"{i}" for i in range(self.number - number, self.number)]

    @rule(number=st.integers(0, 8))
    def a_file_comes(self, number: int) -> None:
        name = f"{len(self.files) + len(self.gone)}.jsonl"
        self.files[name] = self.texts(number)
        write(self.directory / name, self.files[name])

    @precondition(lambda self: self.files)
    @rule(data=st.data(), number=st.integers(1, 7))
    def a_file_grows(self, data: st.DataObject, number: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.files)))
        more = self.texts(number)
        self.files[name] += more
        write(self.directory / name, more, "a")

    @precondition(lambda self: self.files)
    @rule(data=st.data(), number=st.integers(1, 5))
    def a_file_changes(self, data: st.DataObject, number: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.files)))
        self.files[name] = self.texts(number)
        write(self.directory / name, self.files[name])

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def a_file_is_touched(self, data: st.DataObject) -> None:
        if self.held.spec.fingerprint == "full":  # the time is half of the fast one
            os.utime(self.directory / data.draw(st.sampled_from(sorted(self.files))))

    @rule()
    def a_run_begins(self) -> None:
        now = {name: list(texts) for name, texts in self.files.items() if texts}
        try:
            growth = self.held.grow()
        except NothingToDo:
            assert not now
            return
        assert (growth is None) == (now == self.planned)
        self.planned = now

    @invariant()
    def the_plan_holds_what_was_there(self) -> None:
        plan = getattr(self, "held", None) and self.held.plan
        if plan is None or self.planned != {name: texts for name, texts in self.files.items() if texts}:
            return
        assert self.held.texts() == Counter(text for texts in self.planned.values() for text in texts)
        indexes = [unit.index for unit in plan.units]
        assert indexes == sorted(set(indexes))
        assert plan.units.end > indexes[-1]
        row_ids = [row.row_id for row in self.held.rows()]
        assert len(set(row_ids)) == len(row_ids)


GrowingInput.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestGrowingInput = GrowingInput.TestCase


@pytest.fixture
def held(tmp_path: Path) -> Held:
    write(tmp_path / "a.jsonl", ["a0", "a1", "a2", "a3"])
    held = Held(make_spec(tmp_path))
    held.grow("2026-11-01T00:00:00+00:00")
    return held


def test_files_and_units_of_earlier_generations_stay_as_they_are(held: Held, tmp_path: Path) -> None:
    first = held.plan
    assert first is not None
    write(tmp_path / "0.jsonl", ["late"])
    growth = held.grow("2026-11-02T00:00:00+00:00")
    assert growth is not None
    assert list(growth.plan.units)[: len(first.units)] == list(first.units)
    assert growth.plan.files[: len(first.files)] == first.files
    assert [(file.path, file.generation, file.tick[:10]) for file in growth.plan.files] == [
        ("a.jsonl", 1, "2026-11-01"),
        ("0.jsonl", 2, "2026-11-02"),
    ]
    assert growth.plan.first_unit(2) == len(first.units)
    assert growth.plan.ticks == {"2026-11-01T00:00:00+00:00", "2026-11-02T00:00:00+00:00"}


def test_of_a_file_that_grew_only_the_tail_is_planned_with_its_line_numbers(
    held: Held, tmp_path: Path
) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('\n{"text": "a4"}\nno JSON\n')
    held.grow()
    tail = held.rows()[4:]
    assert [row.row_id for row in tail] == ["1:4", "1:5"]
    assert tail[0].columns == {"text": "a4"}
    assert tail[1].failure is not None
    assert "a.jsonl, line 7" in tail[1].failure.message
    assert held.plan is not None
    assert held.plan.num_blank == 1


def test_a_line_that_is_being_written_waits_for_its_end(held: Held, tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "a4"}\n{"te')
    assert held.grow() is not None
    assert held.grow() is None
    assert held.texts()["a4"] == 1
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('xt": "a5"}')
    assert held.grow() is not None
    assert sorted(held.texts()) == ["a0", "a1", "a2", "a3", "a4", "a5"]


def test_a_last_line_that_was_whole_and_goes_on_is_a_change(held: Held, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "b0"}')
    held.grow()
    path.write_text('{"text": "b0"}\n{"text": "b1"}\n')
    assert held.grow() is not None
    path.write_text('{"text": "b0"}\n{"text": "b1"}\n{"text": "b2"}')
    held.grow()
    path.write_text('{"text": "b0"}\n{"text": "b1"}\n{"text": "b2"} \n')
    with pytest.raises(DriftError, match=r"b\.jsonl"):
        held.grow()


def test_a_planned_part_is_read_while_the_file_goes_on_growing(held: Held, tmp_path: Path) -> None:
    before = held.texts()
    write(tmp_path / "a.jsonl", ["more"], "a")
    assert held.texts() == before
    write(tmp_path / "a.jsonl", ["x0", "x1", "x2", "x3", "x4", "x5"])
    with pytest.raises(DriftError, match="the input changed"):
        held.rows()


@pytest.mark.parametrize("change", ["rewritten", "shorter", "compressed and longer"])
def test_changed_files_by_policy(held: Held, tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.jsonl"
    if change == "rewritten":
        write(path, ["n0", "n1", "n2", "n3", "n4"])
    elif change == "shorter":
        write(path, ["a0"])
    else:
        path.write_bytes(gzip.compress(path.read_bytes()) * 9)
    with pytest.raises(DriftError, match=r"a\.jsonl: \d+ -> \d+ bytes\n.*on_changed"):
        held.grow()
    held.spec = make_spec(tmp_path, on_changed="skip")
    assert held.grow() is None
    held.spec = make_spec(tmp_path, on_changed="reprocess")
    growth = held.grow()
    assert growth is not None
    assert growth.superseded == ((0, 2),)
    assert next(iter(growth.plan.units)).index == 2
    assert {row.row_id.partition(":")[0] for row in held.rows()} == {"1"}
    assert held.grow() is None


def test_a_change_that_leaves_no_row_is_refused(held: Held, tmp_path: Path) -> None:
    held.spec = make_spec(tmp_path, on_changed="reprocess")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DriftError, match="--overwrite"):
        held.grow()


def test_numbers_of_superseded_units_are_never_given_again(held: Held, tmp_path: Path) -> None:
    held.spec = make_spec(tmp_path, on_changed="reprocess")
    write(tmp_path / "b.jsonl", ["b0"])
    held.grow()
    (tmp_path / "b.jsonl").write_text("")
    growth = held.grow()
    assert growth is not None
    assert growth.superseded == ((2, 3),)
    write(tmp_path / "c.jsonl", ["c0"])
    held.grow()
    assert held.plan is not None
    assert [unit.index for unit in held.plan.units] == [0, 1, 3]


def test_files_that_are_gone_are_not_missed(held: Held, tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ["b0"])
    (tmp_path / "a.jsonl").unlink()
    growth = held.grow()
    assert growth is not None
    assert len(growth.plan.units) == 3


def test_nothing_there_yet(tmp_path: Path) -> None:
    with pytest.raises(NothingToDo):
        Held(make_spec(tmp_path)).grow()
    with pytest.raises(NothingToDo):
        Held(make_spec(tmp_path / "*.jsonl")).grow()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(NothingToDo):
        Held(make_spec(tmp_path)).grow()
    with pytest.raises(InputError, match="no such file"):
        Held(make_spec(tmp_path / "typo")).grow()


def test_columns_that_the_output_does_not_have_are_refused(held: Held, tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ["b0"], lang="zh")
    with pytest.raises(InputError, match=r"b\.jsonl: it has the column 'lang', which is not in"):
        held.grow()
    (tmp_path / "b.jsonl").write_text('{"text": 5}\n')
    with pytest.raises(InputError, match=r"the column 'text' is int64, the output's is string"):
        held.grow()


def write_parquet(path: Path, texts: list[str], keys: list[int | None]) -> None:
    pq.write_table(pa.table({"text": texts, "id": pa.array(keys, pa.int64())}), path, row_group_size=4)


def test_with_a_key_only_rows_with_new_keys_are_planned(tmp_path: Path) -> None:
    held = Held(make_spec(tmp_path, key="id"))
    write_parquet(tmp_path / "a.parquet", list("abcdef"), [1, 2, 3, None, 4, 2])
    held.grow()
    assert held.texts() == Counter("abcde")
    write_parquet(tmp_path / "b.parquet", list("ABCDEFGH"), [9, 1, 8, None, 2, 7, 6, 4])
    held.grow()
    assert held.texts() == Counter("abcdeACDFG")
    assert held.plan is not None
    assert held.plan.num_known == 4
    assert [row.row_id for row in held.rows()][5:] == ["1:0", "1:2", "1:3", "1:5", "1:6"]
    write_parquet(tmp_path / "c.parquet", list("xy"), [1, 2])
    assert held.grow() is None


def test_keys_of_superseded_rows_are_free_again(tmp_path: Path) -> None:
    held = Held(make_spec(tmp_path, key="id", on_changed="reprocess"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n{"id": 1, "text": "c"}\n')
    held.grow()
    assert held.texts() == Counter("ab")
    path.write_text('{"id": 1, "text": "A"}\n{"id": 2, "text": "B"}\n')
    held.grow()
    assert held.texts() == Counter("AB")
    with path.open("a") as file:
        file.write('{"id": 2, "text": "no"}\n{"id": 3, "text": "C"}\n')
    held.grow()
    assert held.texts() == Counter("ABC")
    assert held.rows()[-1].row_id == "2:3"
