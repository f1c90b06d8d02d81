"""``validate``: what can be wrong with a job and is quick to see, without reading the whole input."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from b2batch.encoding import RowEncoder
from b2batch.errors import OutputError, RowError
from b2batch.estimate import encode_row
from b2batch.inputs.listing import list_files
from b2batch.inputs.plan import make_plan
from b2batch.inputs.sample import first_rows
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.facts import ModelFacts, model_facts
from b2batch.models.families import family_of
from b2batch.notify.delivery import check_webhooks
from b2batch.outputs.store import open_store
from b2batch.preflight import check_schema
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec

_LOOKED_AT_ROWS = 100


@dataclass(frozen=True, slots=True)
class Validation:
    """A job that was found sound as far as a quick look goes.

    Columns are those of the files that hold the first rows. ``num_bad_rows`` of the ``num_rows``
    looked at would be row errors; ``first_fault`` is the first of them. ``webhooks`` are their services.
    """

    model: ModelFacts
    uses_chat: bool
    num_files: int
    num_bytes: int
    columns: tuple[str, ...]
    output_columns: tuple[str, ...]
    num_rows: int
    num_bad_rows: int
    first_fault: str
    output: str
    webhooks: tuple[str, ...]


def validate_job(spec: JobSpec) -> Validation:
    """Check the model's config and tokenizer, the prompt, the columns, the first rows and the output's place.

    Not checked: weights, rows past the first 100, and files past those that hold them.

    Raises:
        CallerError: the first thing found wrong.
    """
    checkpoint = open_checkpoint(spec.model, weights=False)
    codec = family_of(checkpoint).codec(checkpoint, spec.model)
    encoder = RowEncoder(spec, codec, checkpoint.generation_config)
    files = list_files(spec.input)
    rows, input_schema = _look_at_input(spec)
    schema = check_schema(spec, input_schema, checkpoint)
    faults = [fault for row in rows if (fault := _fault(encoder, row))]
    return Validation(
        model=model_facts(checkpoint, codec, spec.model),
        uses_chat=encoder.uses_chat,
        num_files=len(files),
        num_bytes=sum(file.size for file in files),
        columns=tuple(input_schema.names),
        output_columns=tuple(schema.names),
        num_rows=len(rows),
        num_bad_rows=len(faults),
        first_fault=faults[0] if faults else "",
        output=_check_output(spec.output.path),
        webhooks=tuple(check_webhooks(spec.notify)),
    )


def _look_at_input(spec: JobSpec) -> tuple[Sequence[PromptRow], pa.Schema]:
    limit = min(spec.input.limit or _LOOKED_AT_ROWS, _LOOKED_AT_ROWS)
    looked_at = spec.input.model_copy(update={"limit": limit, "fingerprint": "fast"})
    plan = make_plan(looked_at, tick=spec.tick)
    return first_rows(plan, looked_at, limit), plan.schema


def _fault(encoder: RowEncoder, row: PromptRow) -> str:
    try:
        encode_row(encoder, row)
    except RowError as error:
        return f"{row.row_id}: {error.failure.fault}: {error}"
    return ""


def _check_output(path: str) -> str:
    """Where the output goes; OutputError when nothing could be written there. Writes nothing itself."""
    uri = open_store(path, "0" * 64).uri
    if "://" in uri:
        return path  # what an object store grants is seen when the run's preflight writes there
    place = Path(uri)
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    if not existing.is_dir():
        raise OutputError(f"output.path: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"output.path: {existing} cannot be written")
    return path
