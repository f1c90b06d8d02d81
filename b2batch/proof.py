"""``verify``: a finished output compared with its plan, its digests and the input as it is today."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from b2batch.errors import CallerError, InputError, IntegrityError
from b2batch.inputs.files import InputFile
from b2batch.inputs.plan import Plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.inputs.version import stored_version
from b2batch.outputs.drift import check_drift
from b2batch.outputs.footer import digest_rows
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.outputs.verify import RowsDigest, VerifyReport, verify
from b2batch.planning import stored_plan
from b2batch.preflight import prepare_job
from b2batch.rows import WorkUnit
from b2batch.spec import InputSpec, JobSpec, parse_spec

logger = logging.getLogger(__name__)


def verify_job(
    spec: JobSpec, *, with_input: bool = True, repair: bool = False, quarantine: bool = False
) -> VerifyReport:
    """Prove the output of a job: that it is this job's, over the input as the job finds it today.

    Raises:
        DriftError: the output was made from another input or another spec.
        CallerError: the job is not sound, or its output holds no run.
    """
    job = prepare_job(spec)
    directory = RunDirectory.existing(open_store(spec.output.path, job.record.run_id))
    check_drift(directory.record, job.record, directory.store.uri)
    if spec.input.incremental:  # what is new in the input since is the next run's
        return _verify_stored(directory, with_input, repair, quarantine)
    return _verify(directory, job.plan, job.plan.files if with_input else None, repair, quarantine)


def verify_output(
    path: str, *, with_input: bool = True, repair: bool = False, quarantine: bool = False
) -> VerifyReport:
    """Prove an output directory by itself: the spec and the plan are those that stand in it.

    The input is read where the plan says it was. Files may have been copied or touched since: what
    counts is their rows.

    Raises:
        OutputError: the directory holds no run.
        InputError: an input file is gone.
    """
    run_id = RunDirectory.existing(open_store(path)).record.run_id
    directory = RunDirectory.existing(open_store(path, run_id))
    return _verify_stored(directory, with_input, repair, quarantine)


def stored_schema(directory: RunDirectory, plan: Plan) -> pa.Schema:
    """The schema of every part of the run."""
    spec = parse_spec(directory.record.spec)
    return output_schema(plan.schema, spec, directory.record.provenance.get("hidden_size", 0))


def _verify_stored(directory: RunDirectory, with_input: bool, repair: bool, quarantine: bool) -> VerifyReport:
    plan = stored_plan(directory)
    files = [file if file.superseded else _as_it_is(file) for file in plan.files] if with_input else None
    return _verify(directory, plan, files, repair, quarantine)


def _verify(
    directory: RunDirectory,
    plan: Plan,
    files: Sequence[InputFile] | None,
    repair: bool,
    quarantine: bool,
) -> VerifyReport:
    spec = parse_spec(directory.record.spec)
    digest = None if files is None else _rows_digest(files, plan, spec.input)
    schema = stored_schema(directory, plan)
    return verify(directory, plan.units, schema, digest, repair=repair, quarantine=quarantine)


def _rows_digest(files: Sequence[InputFile], plan: Plan, spec: InputSpec) -> RowsDigest:
    """Digests of all units, read in the plan's order: a compressed file is then gone through once."""
    with UnitReader(files, plan.schema, spec) as reader:
        digests = {unit.index: _digest_unit(reader, unit) for unit in plan.units}
    empty = digest_rows(())
    return lambda unit: digests[unit.index] if unit.num_rows else empty


def _digest_unit(reader: UnitReader, unit: WorkUnit) -> str:
    """The digest of a unit as it is now; one that cannot be read has none that equals another."""
    try:
        return digest_rows(row.row_hash for row in reader.read(unit).rows)
    except (CallerError, IntegrityError) as error:
        logger.warning("unit=%d: %s", unit.index, error)
        return ""


def _as_it_is(file: InputFile) -> InputFile:
    version = stored_version(file)
    if version is None:
        raise InputError(f"{file.uri}: the input is gone; --no-input verifies the output by itself")
    return replace(file, size=int(version.partition(" ")[0]), etag=version)
