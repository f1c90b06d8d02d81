"""Daily ticks by a clock set by hand: missed days, late and changed files, overlaps, crashes lose no row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from growing_job import Crash, Machine, age_lease, labels, make_spec, read, write

from b2batch.compaction import compact_output
from b2batch.due import ticks_to_run
from b2batch.errors import DriftError, InputError, NothingToDo, RunLocked, SpecError
from b2batch.outputs.overview import overview
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.planning import stored_plan
from b2batch.preflight import prepare_job
from b2batch.proof import verify_job, verify_output

FIRST_DAY = datetime(2026, 10, 10, 18, 1, tzinfo=UTC)  # a minute past 02:00 in Shanghai


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        yield Machine(patch)


def on_day(day: int) -> datetime:
    return FIRST_DAY + timedelta(days=day)


def the_days_input(directory: Path, day: int) -> None:
    """What comes on a day: a file, lines in a log, now and then a late file, nothing, or other content."""
    inputs = directory / "in"
    if day not in (9, 10):
        write(inputs / f"day-{day:02}.jsonl", [f"第{day}天 {i}" for i in range(3 + day % 4)])
    if day % 3 == 0:
        write(inputs / "log.jsonl", [f"日志 {day} {i}" for i in range(5)], "a")
    if day in (5, 14, 27):
        write(inputs / "late" / f"a-{day - 4:02}.jsonl", [f"迟到 {day} {i}" for i in range(2)])
    if day in (12, 24):
        write(inputs / f"day-{day - 8:02}.jsonl", [f"改过 {day} {i}" for i in range(6)])


def test_thirty_daily_ticks_are_one_run_over_everything(machine: Machine, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, input={"on_changed": "reprocess"})
    output = tmp_path / "out"
    num_died = 0
    for day in range(30):
        the_days_input(tmp_path, day)
        now = on_day(day)
        if day in (7, 8, 20):
            continue  # the machine is off
        if day == 10:
            with pytest.raises(NothingToDo):
                machine.run_tick(spec, now)
            continue
        if day in (11, 12):  # it dies at each of its writes: with new files, then with changed ones too
            num_died += machine.run_through_crashes(spec, now)
        elif day == 15:
            run_beside_another(machine, tmp_path, now)
        else:
            machine.run_tick(spec, now)
        if day == 18:
            compact_output(str(output))
        if day % 6 == 0:
            with pytest.raises(NothingToDo):  # again in the same tick
                machine.run_tick(spec, now + timedelta(hours=20))
    assert num_died > 15

    once = make_spec(tmp_path, output={"path": str(tmp_path / "once")})
    machine.run(once)
    assert labels(output) == labels(tmp_path / "once")
    assert set(labels(output).values()) == {1}
    table = read(output)
    assert len(set(table["row_id"].to_pylist())) == table.num_rows
    generations = dict.fromkeys(
        sorted(zip(table["generation"].to_pylist(), table["tick"].to_pylist(), strict=True))
    )
    assert [number for number, _ in generations] == sorted({number for number, _ in generations})
    assert len({tick for _, tick in generations}) == len(generations), "a generation has one tick"
    assert {tick.astimezone(UTC).hour for _, tick in generations} == {18}
    report = verify_job(spec)
    assert report.problems == ()
    assert report.num_rows == table.num_rows


def run_beside_another(machine: Machine, directory: Path, now: datetime) -> None:
    """The tick begins twice: a driver that hangs holds the lease until it is over."""
    spec = make_spec(directory, input={"on_changed": "reprocess"})
    with pytest.raises(Crash):
        machine.run_tick(spec, now, dies_before=12)
    output = str(directory / "out")
    before = labels(directory / "out")
    run_id = RunDirectory.existing(open_store(output)).record.run_id
    with RunDirectory.existing(open_store(output, run_id)).take_epoch(takeover=True):
        with pytest.raises(RunLocked):
            machine.run_tick(spec, now)
        with pytest.raises(RunLocked):
            machine.run_tick(spec, now + timedelta(days=1))
        assert labels(directory / "out") == before
    machine.run_tick(spec, now)


@pytest.fixture
def grown(machine: Machine, tmp_path: Path) -> Path:
    """Two finished ticks."""
    spec = make_spec(tmp_path)
    for day in (0, 1):
        write(tmp_path / "in" / f"{day}.jsonl", [f"{day}.{i}" for i in range(6)])
        machine.run_tick(spec, on_day(day))
    return tmp_path


def test_each_row_tells_its_generation_and_tick(grown: Path) -> None:
    rows = read(grown / "out").select(["text", "generation", "tick"]).to_pylist()
    told = {row["text"]: (row["generation"], row["tick"].astimezone(UTC)) for row in rows}
    assert told["0.0"] == (1, datetime(2026, 10, 10, 18, tzinfo=UTC))
    assert told["1.5"] == (2, datetime(2026, 10, 11, 18, tzinfo=UTC))
    view = overview(open_store(str(grown / "out")), datetime.now(UTC))
    assert (view.generation, view.tick) == (2, "2026-10-12T02:00:00+08:00")
    assert view.counts.num_rows == 12


def test_a_finished_tick_is_left_as_it_is_and_what_is_new_belongs_to_the_next(
    machine: Machine, grown: Path
) -> None:
    spec = make_spec(grown)
    write(grown / "in" / "more.jsonl", ["neu"])
    with pytest.raises(NothingToDo, match="is finished"):
        machine.run_tick(spec, on_day(1))
    with pytest.raises(NothingToDo, match="is finished"):
        machine.run(spec.at(spec.schedule.tick("2026-10-11T02:00")))
    machine.run_tick(spec, on_day(5))
    assert {row["generation"] for row in read(grown / "out").to_pylist() if row["text"] == "neu"} == {3}
    with pytest.raises(NothingToDo, match="nothing is new"):
        machine.run_tick(spec, on_day(6))


def test_changed_settings_are_drift_and_overwrite_begins_anew(machine: Machine, grown: Path) -> None:
    other = make_spec(grown, sampling={"max_tokens": 3})
    with pytest.raises(DriftError, match=r"sampling\.max_tokens: 2 -> 3"):
        machine.run(other)
    plain = make_spec(grown, input={"incremental": False})
    with pytest.raises(DriftError, match=r"input\.incremental: true -> \(absent\)"):
        machine.run(plain)
    machine.run(other, overwrite=True)
    assert read(grown / "out")["generation"].to_pylist() == [1] * 12
    assert verify_output(str(grown / "out")).problems == ()


def test_files_may_go_and_the_output_is_proved_by_itself(machine: Machine, grown: Path) -> None:
    (grown / "in" / "0.jsonl").unlink()
    write(grown / "in" / "2.jsonl", ["2.0"])
    machine.run_tick(make_spec(grown), on_day(2))
    assert read(grown / "out").num_rows == 13
    with pytest.raises(InputError, match=r"0\.jsonl: the input is gone; --no-input"):
        verify_output(str(grown / "out"))
    assert verify_output(str(grown / "out"), with_input=False).problems == ()


def test_a_prompt_names_the_tick_of_its_row(machine: Machine, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, prompt={"template": "{{ tick.date }} {{ tick.previous.day }}: {{ text }}"})
    write(tmp_path / "in" / "a.jsonl", [f"{i}" for i in range(4)])
    with pytest.raises(SpecError, match="no column 'tick'"):
        machine.run(spec)
    with pytest.raises(Crash):
        machine.run_tick(spec, on_day(0), dies_before=20)
    write(tmp_path / "in" / "b.jsonl", ["b"])
    bound = spec.at(ticks_to_run(spec, "auto", on_day(1))[0])
    prepared = prepare_job(bound)
    assert [file.tick[:10] for file in prepared.plan.files] == ["2026-10-11", "2026-10-12"]
    machine.run(bound)
    assert set(labels(tmp_path / "out").values()) == {1}


def test_ticks_with_an_output_each(machine: Machine, tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        input={"path": str(tmp_path / "in" / "{{ tick.date }}" / "*.jsonl"), "incremental": False},
        output={"path": str(tmp_path / "out" / "{{ tick.date }}")},
        schedule={"catchup": "all"},
    )
    for day in (11, 12, 14, 15):
        write(tmp_path / "in" / f"2026-10-{day}" / "a.jsonl", [f"{day}.{i}" for i in range(3)])
    machine.run_tick(spec, on_day(0))
    with pytest.raises(NothingToDo, match="is finished"):
        machine.run_tick(spec, on_day(0))
    due = ticks_to_run(spec, "auto", on_day(4))
    assert [tick.text[:10] for tick in due] == ["2026-10-12", "2026-10-13", "2026-10-14", "2026-10-15"]
    machine.run(spec.at(due[0]))
    with pytest.raises(InputError, match="no file matches"):
        machine.run(spec.at(due[1]))
    with pytest.raises(Crash):
        machine.run(spec.at(due[2]), dies_before=16)
    assert [tick.text[:10] for tick in ticks_to_run(spec, "auto", on_day(4))] == [
        "2026-10-13",
        "2026-10-14",
        "2026-10-15",
    ]
    age_lease(tmp_path / "out" / "2026-10-14")
    for tick in due[2:]:
        machine.run(spec.at(tick))
    assert labels(tmp_path / "out" / "2026-10-14").keys() == {
        (text, answer) for text, answer in labels(tmp_path / "out" / "2026-10-14")
    }
    assert sum(labels(tmp_path / "out" / "2026-10-15").values()) == 3


def test_with_catchup_none_a_late_start_does_nothing_unless_it_was_begun(
    machine: Machine, tmp_path: Path
) -> None:
    spec = make_spec(tmp_path, schedule={"catchup": "none"})
    write(tmp_path / "in" / "a.jsonl", ["a", "b"])
    late = on_day(0) + timedelta(hours=3)
    with pytest.raises(NothingToDo, match="missed"):
        machine.run_tick(spec, late)
    with pytest.raises(Crash):
        machine.run_tick(spec, on_day(0), dies_before=15)
    machine.run_tick(spec, late)
    assert sum(labels(tmp_path / "out").values()) == 2


def test_rows_with_a_key_are_labelled_once_over_all_generations(machine: Machine, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, input={"key": "text"})
    write(tmp_path / "in" / "0.jsonl", ["a", "b", "c"])
    machine.run_tick(spec, on_day(0))
    write(tmp_path / "in" / "1.jsonl", ["c", "d", "a", "e"])
    machine.run_through_crashes(spec, on_day(1))
    assert Counter(read(tmp_path / "out")["text"].to_pylist()) == Counter("abcde")
    assert verify_job(spec).problems == ()
    plan = stored_plan(RunDirectory.existing(open_store(str(tmp_path / "out"))))
    assert plan.num_known == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"input": {"incremental": False}}, "each tick needs an output of its own"),
        (
            {"input": {"incremental": False}, "output": {"path": "out/{{ tick.month }}"}},
            "each tick needs an output of its own",
        ),
        ({"output": {"path": "out/{{ tick.week }}"}}, r"output.path: \{\{ tick.week \}\}: a tick has"),
    ],
)
def test_paths_that_cannot_be_of_ticks(
    tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    spec = make_spec(tmp_path, **sections)
    with pytest.raises(SpecError, match=message):
        spec.at(ticks_to_run(spec, "auto", on_day(0))[0])


def test_a_path_of_ticks_without_a_tick_is_refused(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, output={"path": "out/{{ tick.date }}"})
    with pytest.raises(SpecError, match="--tick says which"):
        prepare_job(spec)
