"""A whole run without engine or cluster: rows out of thin air, parts, resume, finalise.

As a program (``tiny_run.py OUT [--overwrite]``) it is the driver that the crash tests kill.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from b2batch.errors import RowFailure, RowFault, Stage
from b2batch.outputs.finalise import finalise
from b2batch.outputs.footer import digest_rows
from b2batch.outputs.parts import Part, PartOrigin, commit_part, encode_part, planned_row_ids
from b2batch.outputs.record import RunRecord
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import Store, open_store
from b2batch.outputs.success import Success
from b2batch.rows import FinishReason, Generation, PromptRow, ResultRow, Sample, WorkUnit
from b2batch.spec import JobSpec, apply_overrides, parse_spec

INPUT_SCHEMA = pa.schema({"text": pa.string(), "stars": pa.int64()})
PLAN = b"the plan's bytes"


def make_spec(*overrides: str, **output: Any) -> JobSpec:
    document = {
        "model": {"model": "tiny"},
        "input": {"path": "reviews.jsonl"},
        "prompt": {"column": "text"},
        "output": {"path": "unused", **output},
    }
    return parse_spec(apply_overrides(document, overrides))


def make_units(num_units: int = 4, rows_per_unit: int = 3) -> list[WorkUnit]:
    return [
        WorkUnit(
            index, 0, index * rows_per_unit, rows_per_unit, index * rows_per_unit, (index + 1) * rows_per_unit
        )
        for index in range(num_units)
    ]


def make_record(
    spec: JobSpec,
    units: Sequence[WorkUnit],
    *,
    files: Sequence[dict[str, Any]] = (
        {"path": "reviews.jsonl", "size": 99, "etag": "1", "fingerprint": f"sha256:{'ab' * 32}"},
    ),
    model_digest: str = "weights",
    provenance: dict[str, Any] | None = None,
) -> RunRecord:
    plan = repr(
        (units, spec.input.limit, [(file["path"], file["size"], file["fingerprint"]) for file in files])
    )
    return RunRecord.make(
        spec,
        plan_digest=hashlib.sha256(plan.encode()).hexdigest(),
        num_units=len(units),
        files=files,
        model_digest=model_digest,
        provenance=provenance or {"torch": "2.13"},
    )


def rows_of(unit: WorkUnit) -> list[PromptRow]:
    return [
        PromptRow(row_id, hashlib.md5(row_id.encode()).digest(), {"text": f"评论 {row_id}", "stars": 5})
        for row_id in planned_row_ids(unit)
    ]


def columns_of(unit: WorkUnit) -> pa.Table:
    return pa.Table.from_pylist([dict(row.columns) for row in rows_of(unit)], schema=INPUT_SCHEMA)


def rows_digest(unit: WorkUnit) -> str:
    return digest_rows(row.row_hash for row in rows_of(unit))


def answer(row_id: str) -> ResultRow:
    return ResultRow(row_id, Generation(7, (Sample(f"正面 {row_id}", (1, 2), FinishReason.STOP),)))


def failed(row_id: str, message: str = "no text") -> ResultRow:
    return ResultRow(row_id, failure=RowFailure(RowFault.PROMPT_MISSING, message, Stage.RENDER))


def make_part(
    unit: WorkUnit,
    run_id: str,
    *,
    spec: JobSpec | None = None,
    results: Sequence[ResultRow] | None = None,
    epoch: int = 1,
    attempt: int = 1,
) -> Part:
    rows = rows_of(unit)
    origin = PartOrigin(
        run_id, {"path": "reviews.jsonl", "sha256": "ab" * 32}, epoch, attempt, "w0", {"seed": 0}
    )
    return encode_part(
        unit,
        rows,
        columns_of(unit),
        [answer(row.row_id) for row in rows] if results is None else results,
        output_schema(INPUT_SCHEMA, spec or make_spec()),
        origin,
    )


def drive(
    store: Store,
    spec: JobSpec,
    units: Sequence[WorkUnit],
    *,
    record: RunRecord | None = None,
    bad_rows: Sequence[str] = (),
    **how: Any,
) -> tuple[int, Success]:
    """Run or resume to the end: (units generated in this start, what ``_SUCCESS`` says)."""
    record = record or make_record(spec, units)
    directory = RunDirectory.open(store, record, PLAN, **how)
    done = directory.success()
    if done is not None:
        return 0, done
    num_generated = 0
    with directory.take_epoch() as epoch:
        committed = directory.committed_units(units)
        for unit in units:
            if unit.index in committed:
                continue
            epoch.beat()
            results = [
                failed(row_id) if row_id in bad_rows else answer(row_id) for row_id in planned_row_ids(unit)
            ]
            part = make_part(unit, record.run_id, spec=spec, results=results, epoch=epoch.number)
            commit_part(store, part)
            num_generated += 1
        success = finalise(
            directory,
            units,
            output_schema(INPUT_SCHEMA, spec),
            num_skipped_blank=1,
            max_error_rate=spec.errors.max_error_rate,
        )
    return num_generated, success


def run_at(out: Path | str, *overrides: str, num_units: int = 4, **how: Any) -> tuple[int, Success]:
    spec, units = make_spec(*overrides), make_units(num_units)
    record = make_record(spec, units)
    return drive(open_store(str(out), record.run_id), spec, units, record=record, **how)


if __name__ == "__main__":
    generated, _ = run_at(sys.argv[1], *sys.argv[3:], overwrite="--overwrite" in sys.argv[2:3])
    print(generated)
