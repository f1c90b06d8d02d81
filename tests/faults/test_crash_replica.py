"""kill -9 and SIGSTOP of a replica at every step of its work, with the real model and driver, without Ray.

The driver's own steps F1-F3 and F7-F13 are in ``tests/outputs/test_crash.py``.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from b2batch.proof import verify_output

from .local_job import NUM_ROWS, make_spec, run_locally
from .process_fleet import ReplicaPlan

pytestmark = pytest.mark.slow
WELL = ReplicaPlan()


def read_rows(output: Path) -> list[dict[str, object]]:
    rows = [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    return sorted(rows, key=lambda row: int(str(row["row_id"]).partition(":")[2]))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    output = tmp_path_factory.mktemp("calm")
    run_locally(make_spec(output))
    return read_rows(output)


def suffer_first(plan: ReplicaPlan):
    """The first replica suffers; those after it are well."""
    return lambda replica_id: plan if replica_id == 0 else ReplicaPlan(mutant=plan.mutant)


@pytest.mark.parametrize("failpoint", ["F4", "F4:2", "F5", "F6", "F7", "F8", "F9"])
def test_a_replica_killed_at_any_step_costs_work_and_no_row(tmp_path: Path, calm, failpoint: str) -> None:
    name, _, passing = failpoint.partition(":")
    plan = ReplicaPlan(f"{name}:kill" + (f":{passing}" if passing else ""))
    totals = run_locally(make_spec(tmp_path), suffer_first(plan))
    assert (totals.num_replicas_lost, totals.counts.num_ok) == (1, NUM_ROWS)
    assert read_rows(tmp_path) == calm
    assert verify_output(str(tmp_path)).problems == ()
