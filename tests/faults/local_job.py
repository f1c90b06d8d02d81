"""A whole job with the real driver, worker and model, on processes of this machine instead of Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from b2batch.assets import REVIEWS_SAMPLE
from b2batch.cluster.driver import RunHooks, RunTotals, run_units
from b2batch.cluster.policy import DispatchPolicy
from b2batch.outputs.finalise import finalise
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.preflight import PreparedJob, prepare_job
from b2batch.rows import UnitCounts, WorkUnit
from b2batch.spec import JobSpec, parse_spec
from b2batch.worker_args import WorkerArgs

from .process_fleet import ProcessFleet, ReplicaPlan, Stray

NUM_ROWS = 24
NUM_REPLICAS = 2


def make_spec(output: Path, **sections: dict[str, Any]) -> JobSpec:
    document: dict[str, dict[str, Any]] = {
        "model": {"model": "baichuan2-tiny"},
        "input": {"path": str(REVIEWS_SAMPLE), "limit": NUM_ROWS, "rows_per_unit": 4},
        "prompt": {"column": "text"},
        "sampling": {"max_tokens": 6, "temperature": 4.0, "seed": 3, "ignore_eos": True},
        "engine": {"max_num_seqs": 4},
        "output": {"path": str(output)},
    }
    for name, keys in sections.items():
        document[name] = document.get(name, {}) | keys
    return parse_spec(document)


@dataclass(frozen=True)
class LocalRun:
    """A finished run, and the replicas that are out of reach and may still commit."""

    totals: RunTotals
    strays: list[Stray]


def run_locally(
    spec: JobSpec,
    plan_of: Callable[[int], ReplicaPlan] = lambda replica_id: ReplicaPlan(),
    on_lost: Callable[[], None] = lambda: None,
) -> LocalRun:
    """Run or resume the job to ``_SUCCESS``; replicas suffer what ``plan_of`` says of their ids."""
    job = prepare_job(spec)
    store = open_store(spec.output.path, job.record.run_id)
    directory = RunDirectory.open(store, job.record, job.plan.to_bytes())
    with directory.take_epoch() as epoch:
        committed = directory.committed_units(job.plan.units)
        fleet = ProcessFleet(worker_args(job, directory, epoch.number), plan_of, on_lost)
        totals = run_units(
            [unit for unit in job.plan.units if unit.index not in committed],
            fleet,
            DispatchPolicy(num_replicas=NUM_REPLICAS, start_timeout_s=120.0),
            RunHooks(
                find_committed=lambda unit: _find_committed(directory, unit),
                on_progress=lambda progress: None,
                on_beat=epoch.beat,
                should_stop=lambda: False,
            ),
            drain_grace_s=0.0,
        )
        finalise(directory, job.plan.units, job.schema, num_skipped_blank=0, max_error_rate=0.0)
    return LocalRun(totals, fleet.strays)


def worker_args(job: PreparedJob, directory: RunDirectory, epoch: int) -> WorkerArgs:
    return WorkerArgs(
        spec=job.spec,
        files=job.plan.files,
        input_schema=job.plan.schema,
        output_uri=directory.store.uri,
        run_id=job.record.run_id,
        epoch=epoch,
        provenance=job.record.provenance,
    )


def _find_committed(directory: RunDirectory, unit: WorkUnit) -> UnitCounts | None:
    report = directory.find_part(unit)
    return report and report.counts
