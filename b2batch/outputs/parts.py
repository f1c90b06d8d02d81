"""A unit's results → one Parquet object → committed by exclusive creation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.errors import IntegrityError, RowFailure
from b2batch.outputs.footer import FOOTER_KEY, PartFooter, check_footer, digest_rows, read_part_footer
from b2batch.outputs.layout import part_name
from b2batch.outputs.schema import own_name
from b2batch.outputs.store import Store
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

# What finalise commits for an input without rows, so that the output still has its schema.
EMPTY_UNIT = WorkUnit(index=0, file_index=0, first_row=0, num_rows=0, start=0, stop=0)


@dataclass(frozen=True, slots=True)
class PartOrigin:
    """Who makes a part and from what: everything in its footer but the rows."""

    run_id: str
    file: Mapping[str, Any]
    epoch: int
    attempt: int
    worker_id: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """An encoded part, not committed yet."""

    unit: WorkUnit
    run_id: str
    attempt: int
    counts: UnitCounts
    data: bytes

    @property
    def name(self) -> str:
        """The key under which it is committed."""
        return part_name(self.unit.index, self.run_id[:8])


def encode_part(
    unit: WorkUnit,
    rows: Sequence[PromptRow],
    columns: pa.Table,
    results: Sequence[ResultRow],
    schema: pa.Schema,
    origin: PartOrigin,
) -> Part:
    """The Parquet bytes of a unit's results, with page checksums.

    Args:
        rows: the unit's records, in order.
        columns: their input columns, one table row a record, in the same order.
        results: one a record, in any order.
        schema: of ``output_schema``.

    Raises:
        IntegrityError: rows, columns and results are not the unit's, each exactly once.
    """
    ordered = _in_row_order(unit, rows, columns, results)
    counts = sum((_counts_of(result) for result in ordered), UnitCounts())
    footer = PartFooter(
        run_id=origin.run_id,
        unit_index=unit.index,
        file_index=unit.file_index,
        first_row=unit.first_row,
        num_rows=unit.num_rows,
        file=origin.file,
        rows_digest=digest_rows(row.row_hash for row in rows),
        counts=counts,
        epoch=origin.epoch,
        attempt=origin.attempt,
        worker_id=origin.worker_id,
        provenance=origin.provenance,
    )
    table = _build_table(ordered, columns, schema, _common_values(origin.file))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata({FOOTER_KEY: footer.to_bytes()}),
        sink,
        compression="zstd",
        write_page_checksum=True,
    )
    return Part(unit, origin.run_id, origin.attempt, counts, sink.getvalue().to_pybytes())


def commit_part(store: Store, part: Part) -> UnitReport:
    """Create the part under its unit's name; whoever is second finds it done.

    Raises:
        IntegrityError: the name is taken by something that is not this unit of this run.
        Fenced: the run was replaced.
        OSError: the store failed; the part may or may not be there, and trying again is safe.
    """
    if store.put_if_absent(part.name, part.data):
        return UnitReport(part.unit.index, part.attempt, part.counts, newly_committed=True)
    return find_part(store, part.run_id, part.unit)


def find_part(store: Store, run_id: str, unit: WorkUnit) -> UnitReport:
    """The receipt of a unit that is committed already, from its part's footer.

    Raises:
        FileNotFoundError: it is not committed.
        IntegrityError: what stands under its name is not its part.
    """
    name = part_name(unit.index, run_id[:8])
    footer = read_part_footer(store, name)
    check_footer(footer, run_id, unit, f"{store.uri}/{name}")
    return UnitReport(unit.index, footer.attempt, footer.counts, newly_committed=False)


def planned_row_ids(unit: WorkUnit) -> list[str]:
    """The ``row_id`` of each row of a unit, in order: input file index and ordinal within it."""
    return [f"{unit.file_index}:{unit.first_row + offset}" for offset in range(unit.num_rows)]


def _in_row_order(
    unit: WorkUnit, rows: Sequence[PromptRow], columns: pa.Table, results: Sequence[ResultRow]
) -> list[ResultRow]:
    row_ids = planned_row_ids(unit)
    if [row.row_id for row in rows] != row_ids or columns.num_rows != unit.num_rows:
        raise IntegrityError(f"unit {unit.index}: the records read are not the {unit.num_rows} planned ones")
    by_id = {result.row_id: result for result in results}
    if len(results) != len(row_ids) or by_id.keys() != set(row_ids):
        raise IntegrityError(
            f"unit {unit.index}: {len(results)} results of {len(by_id)} rows for the {unit.num_rows} planned"
        )
    return [by_id[row_id] for row_id in row_ids]


def _counts_of(result: ResultRow) -> UnitCounts:
    generation = result.generation
    if generation is None:
        return UnitCounts(num_error=1)
    cut = any(sample.finish_reason is FinishReason.LENGTH for sample in generation.samples)
    return UnitCounts(
        num_ok=1,
        num_length=int(cut),
        num_input_tokens=generation.num_input_tokens,
        num_generated_tokens=generation.num_generated_tokens,
    )


def _common_values(file: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in each row of a part of an incremental run."""
    tick = file.get("tick")
    return {
        "generation": file.get("generation"),
        "tick": datetime.fromisoformat(tick) if tick else None,
    }


def _build_table(
    results: Sequence[ResultRow], columns: pa.Table, schema: pa.Schema, common: Mapping[str, Any]
) -> pa.Table:
    records = [{**_record(result), **common} for result in results]
    arrays = []
    for field in schema:
        name = own_name(field)
        if name is None:
            arrays.append(columns.column(field.name).cast(field.type))
        else:
            arrays.append(pa.array([record.get(name) for record in records], type=field.type))
    return pa.table(arrays, schema=schema)


def _record(result: ResultRow) -> dict[str, Any]:
    """All own columns of a row as plain Python; the schema says which of them are written."""
    generation = result.generation
    if generation is None:
        if result.failure is None:
            raise IntegrityError(f"row {result.row_id} has neither a generation nor a failure")
        return {
            "row_id": result.row_id,
            "status": "error",
            "finish_reason": FinishReason.ERROR.value,
            "error": _error_value(result.failure),
        }
    return {
        "row_id": result.row_id,
        "status": "ok",
        "num_input_tokens": generation.num_input_tokens,
        "num_generated_tokens": generation.num_generated_tokens,
        "prompt_truncated": generation.prompt_truncated,
        **(_text_columns(generation) if generation.samples else {}),
        **generation.columns,
    }


def _text_columns(generation: Generation) -> dict[str, Any]:
    answer = generation.samples[0]
    return {
        "generated_text": answer.text,
        "finish_reason": answer.finish_reason.value,
        "samples": _samples_value(generation),
        "logprobs": _logprobs_value(answer),
    }


def _error_value(failure: RowFailure) -> dict[str, Any]:
    # The message may quote input that is not valid Unicode; the column must be.
    message = failure.message.encode("utf-8", "backslashreplace").decode()
    return {
        "type": failure.fault.value,
        "message": message,
        "stage": failure.stage.value,
        "attempts": failure.attempts,
    }


def _samples_value(generation: Generation) -> list[dict[str, Any]]:
    return [
        {
            "text": sample.text,
            "finish_reason": sample.finish_reason.value,
            "num_generated_tokens": len(sample.token_ids),
        }
        for sample in generation.samples
    ]


def _logprobs_value(sample: Sample) -> list[dict[str, Any]] | None:
    if sample.logprobs is None:
        return None
    return [
        {
            "token_id": token.token_id,
            "logprob": token.logprob,
            "top": [{"token_id": id_, "logprob": value} for id_, value in token.top.items()],
        }
        for token in sample.logprobs
    ]
