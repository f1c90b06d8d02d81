"""The driver's measurements on small numbers: each counts what it says it counts."""

from __future__ import annotations

import pytest

from b2batch.bench.bench import DRIVER_MEASUREMENTS
from b2batch.bench.child_process import run_child
from b2batch.bench.driver_scale import MEASUREMENTS
from b2batch.bench.table import driver_table
from b2batch.bench.workload import DriverWorkload

SMALL = DriverWorkload(
    kind="driver",
    description="",
    num_units=2000,
    num_replicas=20,
    num_committed=70,
    num_parquet_files=3,
    jsonl_bytes=1_000_000,
    unit_s=10.0,
    simulated_s=200.0,
    ray_s=2.0,
)


def test_every_measurement_is_run():
    assert set(DRIVER_MEASUREMENTS) == MEASUREMENTS.keys()


def test_dispatch_leases_and_commits_every_unit():
    found = MEASUREMENTS["dispatch"](SMALL)

    assert (found.count, found.facts["num_rows"]) == (4000, 2_000_000)


def test_the_loop_takes_in_a_report_a_unit_time_and_replica():
    found = MEASUREMENTS["loop"](SMALL)

    assert found.count == pytest.approx(20 * 200 / 10, rel=0.05)
    assert found.facts["core_share"] == pytest.approx(found.cpu_s / found.facts["seconds"])


def test_resume_finds_every_part():
    assert MEASUREMENTS["resume"](SMALL).count == 70


def test_plans_hold_all_rows():
    parquet, jsonl = MEASUREMENTS["plan-parquet"](SMALL), MEASUREMENTS["plan-jsonl"](SMALL)

    assert (parquet.count, parquet.facts["num_rows"]) == (3, 3000)
    assert 990_000 < jsonl.count < 1_010_000
    assert jsonl.facts["num_rows"] == pytest.approx(jsonl.count / 500, rel=0.05)


def test_the_table_has_a_line_each():
    found = {"resume": {"items": "parts", "count": 1000, "wall_s": 0.5, "cpu_s": 0.4, "peak_bytes": 10**8}}
    found["resume"]["facts"] = {}

    table = driver_table(found, "driver")

    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["resume", "1,000 parts", "0.50", "0.40", "2,000", "100", ""]


@pytest.mark.ray
def test_the_loop_runs_over_ray():
    document = {"measurement": "ray", "workload": SMALL.model_dump(mode="json") | {"unit_s": 0.5}}
    found = run_child("driver_scale", document)

    assert found["count"] == pytest.approx(20 * 2.0 / 0.5, rel=0.3)
