"""A real job run to its end without a model: its rows are read and committed, its answers made up."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from b2batch.inputs.unit_reader import UnitReader
from b2batch.outputs.finalise import finalise
from b2batch.outputs.parts import PartOrigin, commit_part, encode_part
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.status import RunState, Status, write_status
from b2batch.outputs.store import Store, open_store
from b2batch.preflight import prepare_job
from b2batch.rows import FinishReason, Generation, ResultRow, Sample
from b2batch.spec import load_spec

from .command import write_job


def finish_job(directory: Path, num_rows: int = 10, **sections: dict[str, object]) -> Path:
    """The job file of a finished job over ``num_rows`` rows, two a part; its output is ``directory/out``."""
    job_file = write_job(directory, [f'{{"text": "评论 {n}"}}' for n in range(num_rows)], **sections)
    commit_job(job_file)
    return job_file


def commit_job(job_file: Path, *, overwrite: bool = False) -> Store:
    """Run or resume the job."""
    job = prepare_job(load_spec(job_file))
    store = open_store(job.spec.output.path, job.record.run_id)
    run = RunDirectory.open(store, job.record, job.plan.to_bytes(), overwrite=overwrite)
    with run.take_epoch() as epoch, UnitReader(job.plan.files, job.plan.schema, job.spec.input) as reader:
        committed = run.committed_units(job.plan.units)
        for unit in job.plan.units:
            if unit.index in committed:
                continue
            read = reader.read(unit)
            file = asdict(job.plan.files[unit.file_index])
            origin = PartOrigin(job.record.run_id, file, epoch.number, 1, "w0", job.record.provenance)
            results = [_answer(row.row_id) for row in read.rows]
            commit_part(store, encode_part(unit, read.rows, read.columns, results, job.schema, origin))
        success = finalise(run, job.plan.units, job.schema, num_skipped_blank=0, max_error_rate=0.01)
        now, num_units = datetime.now(UTC).isoformat(), len(job.plan.units)
        done = Status(
            run_id=job.record.run_id,
            state=RunState.SUCCEEDED,
            epoch=epoch.number,
            num_units=num_units,
            num_units_committed=num_units,
            counts=success.counts,
            num_replicas=0,
            started=now,
            updated=now,
            exit_code=0,
        )
        write_status(store, done)
    return store


def _answer(row_id: str) -> ResultRow:
    return ResultRow(row_id, Generation(3, (Sample(f"正面 {row_id}", (1, 2), FinishReason.STOP),)))
