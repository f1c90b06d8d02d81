"""What ``gc`` takes, and above all what it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from b2batch.errors import OutputError, RunLocked
from b2batch.outputs.garbage import collect_garbage
from b2batch.outputs.layout import RunKeys, part_name
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store

from .tiny_run import make_record, make_spec, make_units, run_at

DAY_S = 86_400.0
CHANGE = "sampling.temperature=0.5"
OLD8 = make_record(make_spec(), make_units()).run8
NEW8 = make_record(make_spec(CHANGE), make_units()).run8


def write(path: Path, age_s: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"left")
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


def tree(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def collect(out: Path, days: float = 7.0, *, dry_run: bool = False) -> set[str]:
    return set(collect_garbage(str(out), days * DAY_S, dry_run=dry_run).keys)


def test_of_a_finished_run_nothing_goes(tmp_path: Path) -> None:
    run_at(tmp_path)
    before = tree(tmp_path)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1.0, 1.0))
    assert collect(tmp_path, 0.0) == set()
    assert before <= tree(tmp_path)
    assert {key.split("/")[2] for key in tree(tmp_path) - before} <= {"epoch"}
    assert run_at(tmp_path)[0] == 0


def test_what_dead_writers_staged_goes_once_no_lease_can_cover_it(tmp_path: Path) -> None:
    run_at(tmp_path)
    staging = tmp_path / RunKeys(OLD8).staging
    write(staging / "young", 30)
    write(staging / "old", 90)
    write(tmp_path / "__b2batch/probe-0123", 90)
    # the lease is taken first, which tidies the run's own staging by the same rule
    assert collect(tmp_path) == {"__b2batch/probe-0123"}
    assert [path.name for path in staging.iterdir()] == ["young"]


def test_staging_of_another_run_goes_too(tmp_path: Path) -> None:
    run_at(tmp_path)
    write(tmp_path / "__b2batch/deadbeef/tmp/old", 90)
    write(tmp_path / "__b2batch/deadbeef/tmp/young", 30)
    assert collect(tmp_path, dry_run=True) == {"__b2batch/deadbeef/tmp/old"}


def test_records_of_replaced_runs_go_by_age(tmp_path: Path) -> None:
    run_at(tmp_path)
    run_at(tmp_path, CHANGE, overwrite=True)
    lost = write(tmp_path / "__b2batch/deadbeef/run.json", 8 * DAY_S)  # its driver lost the race to be first
    fresh = write(tmp_path / "__b2batch/cafecafe/run.json", 3600)
    os.utime(tmp_path / "__b2batch/gen-0001.json", (1.0, 1.0))
    os.utime(tmp_path / "__b2batch/gen-0002.json", (1.0, 1.0))
    expected = {"__b2batch/deadbeef/run.json", "__b2batch/gen-0001.json"}
    assert collect(tmp_path, dry_run=True) == expected
    assert lost.exists()
    assert collect(tmp_path) == expected
    assert not lost.parent.exists()
    assert fresh.exists()
    assert run_at(tmp_path, CHANGE)[0] == 0
    assert collect(tmp_path) == set()


def test_a_late_part_of_a_replaced_run_goes_and_parts_of_nobody_stay(tmp_path: Path) -> None:
    run_at(tmp_path)
    run_at(tmp_path, CHANGE, overwrite=True)
    late = write(tmp_path / part_name(0, OLD8))
    stray = write(tmp_path / part_name(0, "deadbeef"), 99 * DAY_S)
    aside = write(tmp_path / "__b2batch/quarantine/x", 99 * DAY_S)
    theirs = write(tmp_path / "thesis.tex", 99 * DAY_S)
    assert collect(tmp_path) == {late.name}
    assert stray.exists()
    assert aside.exists()
    assert theirs.exists()
    assert len(list(tmp_path.glob(f"part-*-{NEW8}.parquet"))) == 4


def test_not_while_a_driver_works(tmp_path: Path) -> None:
    run_at(tmp_path)
    write(tmp_path / "__b2batch/probe-0123", 90)
    with RunDirectory.existing(open_store(str(tmp_path), OLD8)).take_epoch(), pytest.raises(RunLocked):
        collect(tmp_path)
    assert (tmp_path / "__b2batch/probe-0123").exists()
    assert not (tmp_path / "__b2batch/gc").exists()


def test_a_fenced_run_stays_fenced(tmp_path: Path) -> None:
    run_at(tmp_path)
    open_store(str(tmp_path)).delete_tree(RunKeys(OLD8).staging)
    collect(tmp_path)
    assert not (tmp_path / RunKeys(OLD8).staging).exists()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no b2batch run"):
        collect(tmp_path)
    assert list(tmp_path.iterdir()) == []
