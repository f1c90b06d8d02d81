"""Rounds of the ``job`` workload: engines without a job, then the job, on the same rows.

    engine alone             one process
    n engines side by side   a process each with an nth of the rows: what the machine gives n replicas
    job, n replicas          through Ray, with all its reading, dispatch and commits

Cores of one machine share caches, memory and clock rate, so n engines are rarely n times as fast as one;
what a job of n replicas loses beyond that is its own.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from b2batch.bench.child_process import run_child
from b2batch.bench.prompts import write_reviews
from b2batch.bench.workload import JobWorkload


def measure_job(workload: JobWorkload, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Interleaved rounds of each kind, by name: the medians, and ``rounds``, all rates."""
    with tempfile.TemporaryDirectory(prefix="b2batch-bench-") as scratch:
        rounds = _Rounds(workload, Path(scratch))
        kinds: dict[str, Callable[[], dict[str, Any]]] = {"engine alone": partial(rounds.engines, 1)}
        for n in workload.replicas:
            if n > 1:
                kinds[f"{n} engines side by side"] = partial(rounds.engines, n)
            kinds[f"job, {n} replicas"] = partial(rounds.job, n)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
        for number in range(1, workload.repeats + 1):
            for name, run in kinds.items():
                on_progress(f"job: {name}, round {number} of {workload.repeats}")
                found[name].append(run())
    return {
        name: {key: statistics.median(each[key] for each in same) for key in same[0]}
        | {"rounds": [each["rows_per_s"] for each in same]}
        for name, same in found.items()
    }


class _Rounds:
    """Runs one round at a time in processes of its own, in a directory that is not there for long."""

    def __init__(self, workload: JobWorkload, scratch: Path) -> None:
        self._workload = workload
        self._scratch = scratch
        self._num_outputs = 0

    def job(self, num_replicas: int) -> dict[str, Any]:
        """A whole job on all rows."""
        self._num_outputs += 1
        return self._run(self._rows(self._workload.rows), f"out-{self._num_outputs}", num_replicas)

    def engines(self, count: int) -> dict[str, Any]:
        """Engines at the same time, each with its share of the rows; their rates are added up."""
        rows = self._rows(self._workload.rows // count)
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda _: self._run(rows, "unused", 0), range(count)))
        return {
            "wall_s": max(each["wall_s"] for each in found),
            "cpu_s": sum(each["cpu_s"] for each in found),
            "rows_per_s": sum(each["rows_per_s"] for each in found),
            "occupancy": statistics.mean(each["occupancy"] for each in found),
        }

    def _run(self, rows: Path, output: str, num_replicas: int) -> dict[str, Any]:
        document = {
            "input": str(rows),
            "output": str(self._scratch / output),
            "replicas": num_replicas,
            "rows_per_unit": self._workload.rows_per_unit,
            "max_tokens": self._workload.max_tokens,
        }
        return run_child("job_run", document)

    def _rows(self, num_rows: int) -> Path:
        path = self._scratch / f"{num_rows}.jsonl"
        if not path.exists():
            write_reviews(path, num_rows)
        return path
