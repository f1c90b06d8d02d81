"""kill -9 at every step of a driver that commits, then the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from b2batch.outputs.layout import SUCCESS
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.outputs.verify import verify

from . import tiny_run
from .tiny_run import INPUT_SCHEMA, make_spec, make_units, rows_digest

SCRIPT = Path(tiny_run.__file__)
CHECKOUT = SCRIPT.parents[2]


def start(out: Path, failpoint: str, *arguments: str) -> int:
    environment = os.environ | {"B2BATCH_FAILPOINT": failpoint, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, str(SCRIPT), str(out), *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=60).returncode


def prove(out: Path, *overrides: str) -> None:
    schema = output_schema(INPUT_SCHEMA, make_spec(*overrides))
    report = verify(RunDirectory.existing(open_store(str(out))), make_units(), schema, rows_digest)
    assert report.problems == ()
    assert sorted(pq.read_table(out).column("row_id").to_pylist()) == sorted(f"0:{n}" for n in range(12))


# The exclusive creations of a driver: probe (twice), run.json, plan, generation, the probe again,
# epoch, then parts; F7 also passes the heartbeat and the probes' ages.
@pytest.mark.parametrize(
    ("failpoint", "num_left"),
    [
        ("F1:kill", 4),
        ("F2:kill", 4),
        ("F3:kill", 4),
        ("F7:kill:1", 4),
        ("F7:kill:14", None),
        ("F8:kill:5", 4),
        ("F8:kill:13", None),
        ("F9:kill:4", 4),
        ("F9:kill:8", None),
        ("F10:kill", 0),
        ("F11:kill", 0),
        ("F12:kill", 0),
        ("F13:kill", 0),
    ],
)
def test_killed_then_run_again(tmp_path: Path, failpoint: str, num_left: int | None) -> None:
    assert start(tmp_path, failpoint) == -signal.SIGKILL
    committed = {path.name: path.read_bytes() for path in tmp_path.glob("part-*")}
    assert num_left is None or len(committed) == 4 - num_left
    if num_left is None:
        assert 0 < len(committed) < 4
    assert (tmp_path / SUCCESS).exists() == (failpoint == "F13:kill")
    num_generated, success = tiny_run.run_at(tmp_path)
    assert num_generated == 4 - len(committed), "committed units must not be generated again"
    assert success.counts.num_rows == 12
    assert committed.items() <= {path.name: path.read_bytes() for path in tmp_path.glob("part-*")}.items()
    prove(tmp_path)


def test_killed_while_it_replaces_a_run(tmp_path: Path) -> None:
    tiny_run.run_at(tmp_path)
    change = "sampling.temperature=0.5"
    assert start(tmp_path, "F8:kill:8", "--overwrite", change) == -signal.SIGKILL
    tiny_run.run_at(tmp_path, change, overwrite=True)
    prove(tmp_path, change)


@pytest.mark.parametrize("setting", ["F8", "F14:kill", "F8:sleep", "F8:kill:0"])
def test_misspelt_failpoint_is_not_ignored(tmp_path: Path, setting: str) -> None:
    assert start(tmp_path, setting) == 1
