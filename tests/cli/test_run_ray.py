"""A job's life by its commands, on real Ray: run, again, drift, verify, damage, too many errors."""

from __future__ import annotations

import json
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


def test_too_many_failed_rows_end_with_3_and_are_all_there(tmp_path: Path) -> None:
    job = write_job(tmp_path, [*ROWS, "{"], errors={"max_error_rate": 0.0})

    ended = b2batch("run", job)

    assert ended.exit_code == 3, ended.output
    assert "1 INPUT_JSON" in ended.stdout
    assert json.loads(ended.stderr.splitlines()[-2])["exit_code"] == 3
    statuses = [row["status"] for row in pq.read_table(tmp_path / "out").to_pylist()]
    assert statuses == ["ok", "ok", "ok", "error"]


def _flip_a_byte(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 0x10
    part.chmod(0o644)
    part.write_bytes(data)
