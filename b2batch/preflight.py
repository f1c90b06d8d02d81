"""Before a job runs: everything that can be wrong with it is refused here, and its plan is made."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from b2batch.encoding import RowEncoder
from b2batch.errors import InputError, SpecError
from b2batch.inputs.plan import Plan
from b2batch.inputs.prompts import PromptRenderer
from b2batch.inputs.schema import check_columns
from b2batch.models.checkpoint import Checkpoint, open_checkpoint
from b2batch.models.families import PromptCodec, family_of
from b2batch.outputs.generation import Extension
from b2batch.outputs.record import RunRecord
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import Store, open_store
from b2batch.planning import RunMaker, plan_run
from b2batch.spec import JobSpec, mask_env

_USUAL_ANSWER_TOKENS = 1024
_PROVENANCE_PACKAGES = ("b2batch", "torch", "transformers", "ray", "pyarrow", "sentencepiece")


@dataclass(frozen=True, slots=True)
class PreparedJob:
    """A job that was found sound, with all that was worked out on the way; nothing has run."""

    spec: JobSpec
    checkpoint: Checkpoint
    codec: PromptCodec
    encoder: RowEncoder
    plan: Plan
    schema: pa.Schema
    record: RunRecord
    extension: Extension | None = None


def prepare_job(spec: JobSpec, overwrite: bool = False) -> PreparedJob:
    """Preflight and plan: everything that can be wrong with a job and seen without running it.

    ``overwrite``: an incremental job is planned as ``RunOptions`` of that name will have it.

    Raises:
        CallerError: the spec, the checkpoint, the input or their combination is refused.
        DriftError: an incremental job's output is of other settings, or its input changed.
        NothingToDo: an incremental job has no rows yet.
    """
    if spec.has_tick_paths:
        raise SpecError("input.path, output.path: {{ tick.… }} stands there: --tick says which tick is meant")
    checkpoint = open_checkpoint(spec.model, weights=False)
    codec = family_of(checkpoint).codec(checkpoint, spec.model)
    encoder = RowEncoder(spec, codec, checkpoint.generation_config)
    maker = RunMaker(spec, _answer_tokens(spec), checkpoint.digest(), _provenance(spec, checkpoint))
    planned = plan_run(maker, overwrite)
    _refuse_own_output(spec, planned.plan)
    schema = check_schema(spec, planned.plan.schema, checkpoint)
    return PreparedJob(
        spec, checkpoint, codec, encoder, planned.plan, schema, planned.record, planned.extension
    )


def _answer_tokens(spec: JobSpec) -> int:
    """How many tokens a row may be answered with, as far as the spec alone says."""
    if spec.task != "generate":
        return 0
    return spec.sampling.n * (spec.sampling.max_tokens or _USUAL_ANSWER_TOKENS)


def check_schema(spec: JobSpec, input_schema: pa.Schema, checkpoint: Checkpoint) -> pa.Schema:
    """The output's schema, once every column that the spec names was found in the input.

    Raises:
        SpecError: a column is missing, or collides with one of b2batch's own.
    """
    PromptRenderer.of(spec).check_columns(input_schema)
    if spec.score.column is not None:
        check_columns(input_schema, [spec.score.column], "score.column")
    if spec.gold is not None:
        check_columns(input_schema, [spec.gold], "gold")
    if spec.input.key is not None:
        check_columns(input_schema, [spec.input.key], "input.key")
    if spec.input.sampling_column is not None:
        check_columns(input_schema, [spec.input.sampling_column], "input.sampling_column")
    return output_schema(input_schema, spec, _hidden_size(checkpoint))


def _hidden_size(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.get("text_config", checkpoint.config).get("hidden_size", 0))


def open_output(spec: JobSpec) -> Store:
    """The output of a job, for reading. The job is planned only where ``{run8}`` in the path asks for it."""
    if "{run8}" not in spec.output.path:
        return open_store(spec.output.path)
    return open_store(spec.output.path, prepare_job(spec).record.run_id)


def _refuse_own_output(spec: JobSpec, plan: Plan) -> None:
    """An output directory inside an input directory would be read as input by the next start."""
    output = open_store(spec.output.path, "0" * 64).uri.rstrip("/") + "/"
    inside = [file.uri for file in plan.files if file.uri.startswith(output)]
    if inside:
        raise InputError(
            f"input.path: {inside[0]} lies in output.path {spec.output.path}; keep the two apart"
        )


def _provenance(spec: JobSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    """What may change bits and was not asked to: versions, dtype, the model's source."""
    return {
        "model": mask_env(checkpoint.source),
        "model_type": checkpoint.model_type,
        "weights": checkpoint.weight_digests(),
        "hidden_size": _hidden_size(checkpoint),
        "dtype": spec.model.dtype,
        "device": spec.model.device,
        "engine": spec.engine.model_dump(mode="json"),
        "seed": spec.sampling.seed,
        "versions": {name: _version(name) for name in _PROVENANCE_PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
