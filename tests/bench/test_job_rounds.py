"""``bench job``: what is run, in which order, and how rates of engines side by side are added up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from b2batch.bench import job_rounds
from b2batch.bench.job_rounds import measure_job
from b2batch.bench.workload import JobWorkload

WORKLOAD = JobWorkload(
    kind="job", description="", rows=100, rows_per_unit=10, max_tokens=4, replicas=(1, 2), repeats=3
)


class Machine:
    """Stands in for the processes: an engine alone has 10, 20 and 60 rows a second, a job a tenth more."""

    def __init__(self) -> None:
        self.outputs: list[str] = []
        self.num_rows: list[tuple[int, int]] = []  # replicas, rows
        self._rates = {
            0: [10.0, 20.0, 20.0, 20.0, 20.0, 20.0, 60.0, 20.0, 22.0],
            1: [11.0] * 3,
            2: [22.0] * 3,
        }

    def run_child(self, module: str, document: Mapping[str, Any]) -> dict[str, Any]:
        assert module == "job_run"
        replicas = document["replicas"]
        self.num_rows.append((replicas, len(Path(document["input"]).read_text("utf-8").splitlines())))
        rates = {"rows_per_s": self._rates[replicas].pop(0), "wall_s": 2.0}
        if replicas:
            self.outputs.append(document["output"])
            return {**rates, "start_s": 9.0, "work_s": 1.0, "finish_s": 1.0}
        return {**rates, "cpu_s": 3.0, "occupancy": 0.5}


def test_engines_side_by_side_share_the_rows_and_their_rates_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, said = Machine(), list[str]()
    monkeypatch.setattr(job_rounds, "run_child", machine.run_child)

    found = measure_job(WORKLOAD, said.append)

    assert list(found) == ["engine alone", "job, 1 replicas", "2 engines side by side", "job, 2 replicas"]
    assert found["engine alone"]["rounds"] == [10.0, 20.0, 60.0]
    assert found["engine alone"]["rows_per_s"] == 20.0
    assert found["2 engines side by side"]["rounds"] == [40.0, 40.0, 42.0]
    assert found["2 engines side by side"]["cpu_s"] == 6.0
    assert machine.num_rows == [(0, 100), (1, 100), (0, 50), (0, 50), (2, 100)] * 3
    assert len(set(machine.outputs)) == 6, "no job goes on with another's output"
    assert [line.rpartition(",")[0] for line in said[:2]] == ["job: engine alone", "job: job, 1 replicas"]
