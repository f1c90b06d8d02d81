"""A job's life by its commands, on real Ray: run, again, drift, verify, damage, bad rows, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .command import b2batch, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
ROWS = ['{"text": "很好"}', '{"text": "不好"}', '{"text": "一般"}']


def test_the_life_of_a_job(tmp_path: Path) -> None:
    job, output = write_job(tmp_path, ROWS), tmp_path / "out"

    first = b2batch("run", job)
    assert first.exit_code == 0, first.output
    assert "3: 3 ok, 0 errors" in first.stdout
    parts = {part: part.stat().st_mtime_ns for part in sorted(output.glob("part-*"))}

    again = json.loads(b2batch("run", job, "--json").stdout)
    assert (again["exit_code"], again["run"]["state"]) == (0, "succeeded")
    assert {part: part.stat().st_mtime_ns for part in sorted(output.glob("part-*"))} == parts

    other = b2batch("run", job, "--set", "sampling.max_tokens=1")
    assert other.exit_code == 4
    assert "sampling.max_tokens: 2 -> 1" in other.stderr

    for target in (job, output):
        assert json.loads(b2batch("status", target, "--json").stdout)["counts"]["num_ok"] == 3
        assert b2batch("verify", target).exit_code == 0

    _flip_a_byte(next(iter(parts)))
    damaged = b2batch("verify", output)
    assert damaged.exit_code == 4
    assert next(iter(parts)).name in damaged.stdout

    assert b2batch("verify", output, "--repair").exit_code == 4
    assert b2batch("run", job).exit_code == 0
    assert b2batch("verify", output).exit_code == 0


def test_verify_reads_the_input_as_it_is_today(tmp_path: Path) -> None:
    job, rows, output = write_job(tmp_path, ROWS), tmp_path / "rows.jsonl", tmp_path / "out"
    assert b2batch("run", job).exit_code == 0

    os.utime(rows, (1, 1))
    assert b2batch("verify", output).exit_code == 0, "a file that was only touched has the same rows"

    rows.write_text(rows.read_text(encoding="utf-8").replace("一般", "很差"), encoding="utf-8")
    changed = b2batch("verify", output)
    assert changed.exit_code == 4
    assert "its rows are not those of the input rows.jsonl" in changed.stdout
    drifted = b2batch("verify", job)
    assert drifted.exit_code == 4
    assert "rows.jsonl" in drifted.stderr

    rows.unlink()
    gone = b2batch("verify", output)
    assert gone.exit_code == 2
    assert "--no-input" in gone.stderr
    assert b2batch("verify", output, "--no-input").exit_code == 0


def test_too_many_failed_rows_end_with_3_and_are_all_there(tmp_path: Path) -> None:
    job = write_job(tmp_path, [*ROWS, "{"], errors={"max_error_rate": 0.0})

    ended = b2batch("run", job)

    assert ended.exit_code == 3, ended.output
    assert "1 INPUT_JSON" in ended.stdout
    assert json.loads(ended.stderr.splitlines()[-2])["exit_code"] == 3
    statuses = [row["status"] for row in pq.read_table(tmp_path / "out").to_pylist()]
    assert statuses == ["ok", "ok", "ok", "error"]


def test_bad_rows_are_rows_with_their_place_and_their_fault(tmp_path: Path) -> None:
    job = write_job(tmp_path, [*ROWS, "{", '{"text": null}', "", '{"text": ""}'])

    ended = b2batch("run", job)

    assert ended.exit_code == 0, ended.output
    assert "6: 3 ok, 3 errors" in ended.stdout
    assert "1 blank line left out" in ended.stdout
    rows = {row["row_id"]: row["error"] for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert {row_id: error["type"] for row_id, error in rows.items() if error} == {
        "0:3": "INPUT_JSON",
        "0:4": "PROMPT_MISSING",
        "0:5": "PROMPT_EMPTY",
    }
    assert "rows.jsonl:4" in rows["0:3"]["message"] or "line 4" in rows["0:3"]["message"]
    assert "'text' is null" in rows["0:4"]["message"]
    assert b2batch("verify", job).exit_code == 0


def test_an_empty_file_is_a_finished_run(tmp_path: Path) -> None:
    job = write_job(tmp_path, [])

    assert b2batch("run", job).exit_code == 0
    assert "0: 0 ok, 0 errors" in b2batch("status", job).stdout
    assert b2batch("verify", job).exit_code == 0
    assert pq.read_table(tmp_path / "out").num_rows == 0


def test_answers_that_were_cut_are_told(tmp_path: Path) -> None:
    job = write_job(tmp_path, ROWS, sampling={"max_tokens": 1, "ignore_eos": True})

    ended = b2batch("run", job)

    assert "3 cut by max_tokens or the context (100 %)" in ended.stdout
    assert "raise sampling.max_tokens" in ended.stdout


def test_signals_stop_a_run_that_then_goes_on(tmp_path: Path) -> None:
    sampling = {"max_tokens": 150, "ignore_eos": True}
    job = write_job(
        tmp_path,
        ROWS * 10,
        sampling=sampling,
        engine={"max_num_seqs": 2},
        cluster={"replicas": 1, "address": "local"},
    )
    output = tmp_path / "out"

    ended, said = _signal_after_a_part(job, output, [signal.SIGTERM])
    assert ended == 75, said
    assert "SIGTERM: stopping" in said
    drained = json.loads(said.splitlines()[-2])["run"]
    assert (drained["state"], drained["num_units_committed"]) == ("drained", len(list(output.glob("part-*"))))
    assert said.splitlines()[-1].startswith("error: stopped after")

    first = {part.name: part.stat().st_mtime_ns for part in output.glob("part-*")}
    ended, said = _signal_after_a_part(job, output, [signal.SIGINT, signal.SIGTERM])
    assert ended == 143, said
    assert json.loads(b2batch("status", output, "--json").stdout)["exit_code"] == 143

    overrides = ["--set", "cluster.address=auto", "--set", "engine.max_num_seqs=64"]
    assert b2batch("run", job, *overrides).exit_code == 0
    parts = {part.name: part.stat().st_mtime_ns for part in output.glob("part-*")}
    assert parts.items() >= first.items(), "what was committed was not made again"
    assert b2batch("verify", job).exit_code == 0


def _signal_after_a_part(job: Path, output: Path, signals: list[signal.Signals]) -> tuple[int, str]:
    """Run ``job`` in a process of its own and signal it once it committed: its exit code and stderr."""
    num_parts = len(list(output.glob("part-*")))
    driver = subprocess.Popen(
        [sys.executable, "-m", "b2batch", "run", str(job)], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline_s = time.monotonic() + 150
    while len(list(output.glob("part-*"))) == num_parts and driver.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)  # another process works: there is nothing else to wait on
    for number in signals:
        driver.send_signal(number)
    _, said = driver.communicate(timeout=120)
    return driver.returncode, said


def _flip_a_byte(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 0x10
    part.chmod(0o644)
    part.write_bytes(data)
