"""The lock as a user meets it: ``lock show``, ``lock break`` and ``run --wait-lock``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from b2batch.job import RunOptions, run_job
from b2batch.outputs import lock
from b2batch.outputs.lease import Epoch
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.spec import load_spec

from .command import b2batch
from .finished_job import commit_job, finish_job


@contextmanager
def unfinished_and_held(directory: Path) -> Iterator[tuple[Path, Epoch]]:
    """A job of 10 rows of which a driver has the lease and lacks a part."""
    job_file = finish_job(directory)
    (directory / "out" / "_SUCCESS").unlink()
    next((directory / "out").glob("part-*")).unlink()
    run = RunDirectory.existing(open_store(str(directory / "out")))
    store = open_store(str(directory / "out"), run.record.run_id)
    store.probe()
    with RunDirectory(store, run.record, run.generation).take_epoch("nightly") as epoch:
        yield job_file, epoch


def test_show_tells_people_and_programs_who_holds_it(tmp_path: Path) -> None:
    with unfinished_and_held(tmp_path) as (job_file, _):
        told = b2batch("lock", "show", job_file)
        assert told.exit_code == 0
        for part in ("held", f"pid {os.getpid()}", os.uname().nodename, "job nightly", "ends in"):
            assert part in told.stdout
        document = json.loads(b2batch("lock", "show", tmp_path / "out", "--json").stdout)
        assert (document["held"], document["epoch"], document["holder"]["pid"]) == (True, 2, os.getpid())
        assert 0 < document["ends_in_s"] <= 60
    assert "free" in b2batch("lock", "show", tmp_path / "out").stdout
    assert not json.loads(b2batch("lock", "show", tmp_path / "out", "--json").stdout)["held"]


def test_show_of_what_is_no_run(tmp_path: Path) -> None:
    assert b2batch("lock", "show", tmp_path / "nowhere").exit_code == 2
    assert not (tmp_path / "nowhere").exists()


def test_break_asks_and_spares_the_living(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with unfinished_and_held(tmp_path) as (job_file, epoch):
        assert b2batch("lock", "break", out).exit_code == 1, "nobody confirmed"
        spared = b2batch("lock", "break", out, "--yes")
        assert spared.exit_code == 99
        assert "--force" in spared.stderr
        epoch.check_not_fenced()
        assert b2batch("run", job_file).exit_code == 99
        broken = b2batch("lock", "break", out, "--yes", "--force")
        assert broken.exit_code == 0, broken.output
        assert "by epoch 3" in broken.stdout
        assert "exit code 1" in broken.stdout
        again = b2batch("lock", "break", out, "--yes", "--json")
        assert (again.exit_code, json.loads(again.stdout)["broken_by_epoch"]) == (0, None)


def test_a_run_that_waited_finds_what_the_other_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_POLL_S", 0.01)
    with unfinished_and_held(tmp_path) as (job_file, other):

        def let_the_other_finish() -> bool:
            if other.number == 2:
                other.close()
                other.number = 0
                commit_job(job_file)
            return False

        assert b2batch("run", job_file, "--wait-lock", "0.3").exit_code == 99
        result = run_job(load_spec(job_file), RunOptions(wait_lock_s=60.0, should_stop=let_the_other_finish))
        assert (result.counts.num_ok, result.num_rows_resumed) == (10, 10)
    assert b2batch("run", job_file, "--wait-lock", "inf").exit_code == 0


def test_a_run_that_waits_says_for_whom_and_hears_sigterm(tmp_path: Path) -> None:
    with unfinished_and_held(tmp_path) as (job_file, epoch):
        waiting = subprocess.Popen(
            [sys.executable, "-m", "b2batch", "run", str(job_file), "--wait-lock", "inf"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        line = next(line for line in waiting.stderr if "waiting for the lock" in line)
        assert f"pid {os.getpid()}" in line
        waiting.send_signal(signal.SIGTERM)
        waiting.communicate(timeout=60)
        assert waiting.returncode == 75
        epoch.check_not_fenced()
