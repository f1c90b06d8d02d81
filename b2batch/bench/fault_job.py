"""The job that is disturbed, and its rows when nobody disturbs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from b2batch.assets import REVIEWS_SAMPLE
from b2batch.bench.driver_process import DriverProcess
from b2batch.bench.fault_cluster import FaultCluster
from b2batch.bench.invariants import Row, read_rows
from b2batch.bench.workload import FaultsWorkload
from b2batch.errors import MeasurementFailed

NUM_REPLICAS = 2
_BAD_LINES = ("{", '{"text": 5}', '{"text": "\\ud800"}')
_CALM_TIMEOUT_S = 600.0


def make_job(scratch: Path, output: Path, workload: FaultsWorkload) -> dict[str, Any]:
    """A job on the embedded model whose answers depend on every row, with a few bad rows among the good."""
    return {
        "model": {"model": "baichuan2-tiny"},
        "input": {"path": str(_input(scratch, workload.rows)), "rows_per_unit": workload.rows_per_unit},
        "prompt": {"column": "text"},
        "sampling": {
            "max_tokens": workload.max_tokens,
            "temperature": 4.0,
            "seed": workload.seed,
            "ignore_eos": True,
        },
        "engine": {"max_num_seqs": 4},
        "output": {"path": str(output)},
        "cluster": {"replicas": NUM_REPLICAS, "drain_grace_s": 2.0},
        "errors": {"max_error_rate": 0.5},
    }


def _input(scratch: Path, num_rows: int) -> Path:
    path = scratch / "rows.jsonl"
    if not path.exists():
        good = REVIEWS_SAMPLE.read_text(encoding="utf-8").splitlines()
        lines = [good[index % len(good)] for index in range(num_rows)]
        lines[10::50] = [_BAD_LINES[index % len(_BAD_LINES)] for index in range(len(lines[10::50]))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_calm(scratch: Path, cluster: FaultCluster, workload: FaultsWorkload) -> list[Row]:
    """The rows of a run that nobody disturbs.

    Raises:
        MeasurementFailed: it did not end with 0.
    """
    output = scratch / "calm"
    job = scratch / "calm.json"
    job.write_text(json.dumps(make_job(scratch, output, workload)))
    driver = DriverProcess(scratch, job, cluster.environment, "--address", cluster.address)
    try:
        code = driver.wait(_CALM_TIMEOUT_S)
    finally:
        driver.end()
    if code != 0:
        raise MeasurementFailed(f"the undisturbed run failed: {driver.tail()}")
    return read_rows(output)
