"""What a large run costs its driver, without a model: dispatch, the loop, resume and plan.

Each measurement runs in a process of its own; ``peak_bytes`` is all of that process, libraries included.
"""

from __future__ import annotations

import heapq
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.bench.child import cpu_s, peak_bytes
from b2batch.bench.workload import DriverWorkload
from b2batch.cluster.actions import Action, Finish, Lease, StartReplica
from b2batch.cluster.dispatch import Dispatcher
from b2batch.cluster.policy import DispatchPolicy
from b2batch.inputs.plan import Units, make_plan
from b2batch.outputs.footer import digest_rows
from b2batch.outputs.parts import PartOrigin, encode_part, planned_row_ids
from b2batch.outputs.record import RunRecord
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.rows import (
    FinishReason,
    Generation,
    PromptRow,
    ResultRow,
    Sample,
    UnitCounts,
    UnitReport,
    WorkUnit,
)
from b2batch.spec import InputSpec, JobSpec, parse_spec

_ROWS_PER_UNIT = 1000
_COUNTS = UnitCounts(num_ok=_ROWS_PER_UNIT, num_input_tokens=100_000, num_generated_tokens=50_000)
_PART_ROWS = 4  # a footer costs the same whatever stands above it
_FILE_ROWS = 1000
_START_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """One measurement. ``items`` says what ``count`` counts."""

    items: str
    count: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    facts: Mapping[str, float]


def run(document: Mapping[str, Any]) -> dict[str, Any]:
    """Make the measurement that ``document`` names; the entry of the child process."""
    workload = DriverWorkload.model_validate(document["workload"])
    return asdict(MEASUREMENTS[document["measurement"]](workload))


def make_units(num_units: int) -> Units:
    """Units of 1,000 rows, as a plan of one JSONL file would hold them."""
    index = np.arange(num_units, dtype=np.int64)
    zero = np.zeros(num_units, np.int64)
    first = index * _ROWS_PER_UNIT
    num_rows = np.full(num_units, _ROWS_PER_UNIT, np.int64)
    return Units(np.column_stack([zero, first, num_rows, first * 100, (first + num_rows) * 100, zero]))


class _Clock:
    """CPU and wall time from its making on."""

    def __init__(self) -> None:
        self._started_s, self._cpu_before_s = time.perf_counter(), cpu_s()

    def result(self, items: str, count: int, **facts: float) -> ScaleResult:
        """What was measured up to now."""
        wall_s = time.perf_counter() - self._started_s
        return ScaleResult(items, count, wall_s, cpu_s() - self._cpu_before_s, peak_bytes(), facts)


# --- dispatch ------------------------------------------------------------------------------------


def measure_dispatch(workload: DriverWorkload) -> ScaleResult:
    """Every unit of the run through the dispatcher; a decision is a lease or a commit.

    Replicas take equally long for a unit, but begin one after the other, so that each report is an
    event of its own. Keeping the simulated replicas is part of the time.
    """
    units = make_units(workload.num_units)
    clock = _Clock()
    policy = DispatchPolicy(workload.num_replicas, _START_TIMEOUT_S)
    dispatcher = Dispatcher(range(len(units)), policy)
    running: list[tuple[float, int, int, int]] = []  # when it ends, replica, unit, attempt

    def take(actions: list[Action], now_s: float) -> bool:
        for action in actions:
            if isinstance(action, Lease):
                end_s = now_s + workload.unit_s
                heapq.heappush(running, (end_s, action.replica_id, action.unit_index, action.attempt))
        return any(isinstance(action, Finish) for action in actions)

    starts = [action for action in dispatcher.start(0.0) if isinstance(action, StartReplica)]
    for number, action in enumerate(starts):
        now_s = workload.unit_s * number / len(starts)
        take(dispatcher.on_replica_ready(action.replica_id, now_s), now_s)
    is_finished = False
    while not is_finished:
        now_s, replica_id, unit_index, attempt = heapq.heappop(running)
        report = UnitReport(unit_index, attempt, _COUNTS)
        is_finished = take(dispatcher.on_report(replica_id, report), now_s)
    return clock.result("decisions", 2 * len(units), num_rows=float(dispatcher.units.counts.num_rows))


def measure_loop(workload: DriverWorkload) -> ScaleResult:
    """The driver's loop on a simulated clock; ``core_share`` is CPU seconds over simulated seconds.

    The units are a list, as a job that resumes holds them.
    """
    from b2batch.bench.simulated_fleet import drive_simulated

    return drive_simulated(list(make_units(workload.num_units)), workload)


def measure_ray(workload: DriverWorkload) -> ScaleResult:
    """The driver's loop over real Ray calls to stand-ins, in real time; Ray's own threads included."""
    from b2batch.bench.simulated_fleet import drive_on_ray

    return drive_on_ray(make_units(workload.num_units), workload)


# --- resume --------------------------------------------------------------------------------------


def measure_resume(workload: DriverWorkload) -> ScaleResult:
    """From an output directory with committed parts to knowing which units are done."""
    units = [WorkUnit(i, 0, i * _PART_ROWS, _PART_ROWS, 0, 0) for i in range(workload.num_committed)]
    spec = _spec()
    record = RunRecord.make(
        spec, plan_digest="0" * 64, num_units=len(units), files=[], model_digest="", provenance={}
    )
    with tempfile.TemporaryDirectory(prefix="b2batch-bench-") as directory:
        store = open_store(directory, record.run_id)
        RunDirectory.open(store, record, b"plan")
        for unit in units:
            name, data = _part(unit, record, spec)
            Path(directory, name).write_bytes(data)  # without the fsync of a commit: it is not measured
        clock = _Clock()
        committed = RunDirectory.open(store, record, b"plan").committed_units(units)
        return clock.result("parts", len(committed))


def _spec() -> JobSpec:
    return parse_spec(
        {
            "model": {"model": "none"},
            "input": {"path": "prompts.jsonl"},
            "prompt": {"column": "text"},
            "output": {"path": "unused"},
        }
    )


def _part(unit: WorkUnit, record: RunRecord, spec: JobSpec) -> tuple[str, bytes]:
    schema = pa.schema({"text": pa.string()})
    rows = [PromptRow(row_id, row_id.encode(), {"text": row_id}) for row_id in planned_row_ids(unit)]
    answer = Generation(7, (Sample("good", (1, 2), FinishReason.STOP),))
    results = [ResultRow(row.row_id, answer) for row in rows]
    digest = digest_rows(row.row_hash for row in rows)
    origin = PartOrigin(record.run_id, {"path": "prompts.jsonl", "fingerprint": digest}, 1, 1, "worker", {})
    columns = pa.table({"text": [row.row_id for row in rows]}, schema=schema)
    part = encode_part(unit, rows, columns, results, output_schema(schema, spec), origin)
    return part.name, part.data


# --- plan ----------------------------------------------------------------------------------------


def measure_parquet_plan(workload: DriverWorkload) -> ScaleResult:
    """A plan of many Parquet files of 1,000 rows each."""
    with tempfile.TemporaryDirectory(prefix="b2batch-bench-") as directory:
        table = pa.table({"id": range(_FILE_ROWS), "text": [f"prompt {i}" for i in range(_FILE_ROWS)]})
        for index in range(workload.num_parquet_files):
            pq.write_table(table, Path(directory, f"{index:06}.parquet"))
        return _measure_plan(directory, "files", workload.num_parquet_files)


def measure_jsonl_plan(workload: DriverWorkload) -> ScaleResult:
    """A plan of one JSONL file of about ``jsonl_bytes``."""
    with tempfile.TemporaryDirectory(prefix="b2batch-bench-") as directory:
        path = Path(directory, "prompts.jsonl")
        with path.open("wb") as file:
            for block in _json_blocks(workload.jsonl_bytes):
                file.write(block)
        return _measure_plan(directory, "bytes", path.stat().st_size)


def _json_blocks(num_bytes: int) -> Iterator[bytes]:
    """Lines of about 500 bytes."""
    lines = [json.dumps({"id": i, "text": "a prompt of some words " * 20}) + "\n" for i in range(1000, 2000)]
    block = "".join(lines).encode()
    for _ in range(num_bytes // len(block)):
        yield block
    yield b"".join(line.encode() for line in lines[: num_bytes % len(block) // len(lines[0]) + 1])


def _measure_plan(directory: str, items: str, count: int) -> ScaleResult:
    clock = _Clock()
    plan = make_plan(InputSpec(path=(directory,)))
    return clock.result(items, count, num_rows=float(plan.num_rows), num_units=float(len(plan.units)))


MEASUREMENTS: dict[str, Callable[[DriverWorkload], ScaleResult]] = {
    "dispatch": measure_dispatch,
    "loop": measure_loop,
    "ray": measure_ray,
    "resume": measure_resume,
    "plan-parquet": measure_parquet_plan,
    "plan-jsonl": measure_jsonl_plan,
}
