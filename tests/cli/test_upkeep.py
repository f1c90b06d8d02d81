"""The verbs that look after an output: verify with its repairs, compact, gc."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store

from .command import b2batch, write_job
from .finished_job import commit_job, finish_job


def texts(out: Path) -> list[str]:
    return sorted(pq.read_table(out).column("generated_text").to_pylist())


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*"))


# --- verify --------------------------------------------------------------------------------------


def test_verify_repairs_what_was_damaged_and_the_run_makes_only_that_again(tmp_path: Path) -> None:
    job, out = finish_job(tmp_path), tmp_path / "out"
    before = {path.name: path.read_bytes() for path in parts(out)}
    gone, cut, flipped, *_ = parts(out)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-20])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 8
    flipped.write_bytes(data)
    found = b2batch("verify", out)
    assert found.exit_code == 4
    for path in (gone, cut, flipped):
        assert path.name in found.stdout
    assert b2batch("verify", out, "--repair").exit_code == 4
    assert "_SUCCESS was removed" in b2batch("status", out).stdout
    assert {path.name for path in parts(out)} == before.keys() - {gone.name, cut.name, flipped.name}
    commit_job(job)
    assert b2batch("verify", job).exit_code == 0
    untouched = before.keys() - {gone.name, cut.name, flipped.name}
    assert {name: (out / name).read_bytes() for name in untouched} == {
        name: before[name] for name in untouched
    }


def test_verify_sets_parts_of_other_runs_aside_and_leaves_other_files_alone(tmp_path: Path) -> None:
    finish_job(tmp_path)
    out = tmp_path / "out"
    stray = out / "part-000001-deadbeef.parquet"
    stray.write_bytes(parts(out)[0].read_bytes())
    (out / "notes.txt").write_text("mine")
    found = json.loads(b2batch("verify", out, "--json").stdout)
    assert found["foreign"] == ["notes.txt"]
    assert len(found["problems"]) == 1
    assert stray.name in found["problems"][0]
    assert json.loads(b2batch("verify", out, "--quarantine", "--json").stdout)["set_aside"] == [stray.name]
    assert not stray.exists()
    assert [path.name[9:] for path in (out / "__b2batch/quarantine").iterdir()] == [stray.name]
    proved = b2batch("verify", out)
    assert proved.exit_code == 0
    assert "notes.txt" in proved.stdout
    assert (out / "notes.txt").read_text() == "mine"


def test_verify_finds_a_plan_that_was_exchanged(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    finish_job(tmp_path / "a")
    finish_job(tmp_path / "b", num_rows=8)
    (ours,) = (tmp_path / "a/out").glob("__b2batch/*/plan.parquet")
    (other,) = (tmp_path / "b/out").glob("__b2batch/*/plan.parquet")
    ours.write_bytes(other.read_bytes())
    result = b2batch("verify", tmp_path / "a/out")
    assert result.exit_code == 4
    assert "the stored plan is not the one of its run.json" in result.stderr


# --- compact -------------------------------------------------------------------------------------


def test_compact_merges_and_verify_proves_it(tmp_path: Path) -> None:
    job, out = finish_job(tmp_path), tmp_path / "out"
    before = texts(out)
    result = b2batch("compact", job)
    assert result.exit_code == 0
    assert "5 parts, now 1: 10 rows" in result.stdout
    assert len(parts(out)) == 1
    assert texts(out) == before
    assert list(out.glob("__b2batch/*/tmp")) == [], "nothing staged is left, and a stray writer is fenced"
    assert b2batch("verify", out).exit_code == 0
    assert b2batch("verify", job).exit_code == 0
    status = json.loads(b2batch("status", out, "--json").stdout)
    assert (status["counts"]["num_ok"], status["exit_code"]) == (10, 0)
    assert "nothing to merge" in b2batch("compact", out).stdout


def test_compact_keeps_the_verdict_on_failed_rows(tmp_path: Path) -> None:
    finish_job(tmp_path)
    b2batch("compact", tmp_path / "out")
    success = RunDirectory.existing(open_store(str(tmp_path / "out"))).success()
    assert success is not None
    assert not success.partial


def test_compact_of_what_is_not_finished(tmp_path: Path) -> None:
    finish_job(tmp_path)
    out = tmp_path / "out"
    (out / "_SUCCESS").unlink()
    result = b2batch("compact", out)
    assert result.exit_code == 2
    assert "not finished" in result.stderr
    (tmp_path / "new").mkdir()
    assert b2batch("compact", write_job(tmp_path / "new", ['{"text": "a"}'])).exit_code == 2


def test_a_compacted_output_is_repaired_and_replaced_like_any(tmp_path: Path) -> None:
    job, out = finish_job(tmp_path), tmp_path / "out"
    before = texts(out)
    b2batch("compact", out)
    (merged,) = parts(out)
    merged.write_bytes(merged.read_bytes()[:-9])
    assert b2batch("verify", out, "--repair").exit_code == 4
    commit_job(job)
    assert len(parts(out)) == 5
    assert texts(out) == before
    b2batch("compact", out)
    commit_job(job, overwrite=True)
    assert len(parts(out)) == 5
    assert b2batch("verify", job).exit_code == 0


@pytest.mark.parametrize("failpoint", ["F8:kill:6", "F9:kill:5"])
def test_compact_that_is_killed_loses_nothing_and_goes_on(tmp_path: Path, failpoint: str) -> None:
    finish_job(tmp_path)
    out = tmp_path / "out"
    before = texts(out)
    command = [sys.executable, "-m", "b2batch", "compact", str(out)]
    ended = subprocess.run(command, env=os.environ | {"B2BATCH_FAILPOINT": failpoint}, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert set(texts(out)) == set(before)
    assert not (out / "_SUCCESS").exists()
    for verb in ("verify", "status"):
        assert "a compaction was cut short: `b2batch compact`" in b2batch(verb, out).stdout
    assert b2batch("compact", out).exit_code == 0
    assert texts(out) == before
    assert len(parts(out)) == 1
    assert b2batch("verify", out).exit_code == 0


# --- gc ------------------------------------------------------------------------------------------


def test_gc_tells_then_removes_what_is_left_over(tmp_path: Path) -> None:
    job, out = finish_job(tmp_path), tmp_path / "out"
    left = out / "__b2batch/deadbeef/run.json"
    left.parent.mkdir()
    left.write_bytes(b"{}")
    os.utime(left, (1.0, 1.0))
    told = b2batch("gc", job, "--dry-run")
    assert told.exit_code == 0
    assert "__b2batch/deadbeef/run.json" in told.stdout
    assert "would go" in told.stdout
    assert left.exists()
    removed = json.loads(b2batch("gc", out, "--older-than", "30", "--json").stdout)
    assert (removed["keys"], removed["num_bytes"]) == (["__b2batch/deadbeef/run.json"], 2)
    assert not left.parent.exists()
    assert b2batch("verify", job).exit_code == 0
