"""The one Arrow schema of an output, fixed before the first row: carried input columns, then b2batch's own.

An own column is told by its field metadata, not by its name, so that readers of a part find it whatever
``output.prefix`` says.
"""

from __future__ import annotations

import difflib

import pyarrow as pa

from b2batch.errors import SpecError
from b2batch.outputs.parsed import arrow_type
from b2batch.spec import JobSpec, StructuredOutputsSpec

_OWN = b"b2batch"

_LOGPROBS = pa.list_(
    pa.struct(
        {
            "token_id": pa.int32(),
            "logprob": pa.float32(),
            "top": pa.list_(pa.struct({"token_id": pa.int32(), "logprob": pa.float32()})),
        }
    )
)
_SAMPLES = pa.list_(
    pa.struct({"text": pa.string(), "finish_reason": pa.string(), "num_generated_tokens": pa.int32()})
)
_CLASSIFIED = {
    "label": pa.string(),
    "label_score": pa.float64(),
    "label_probs": pa.map_(pa.string(), pa.float64()),
    "label_margin": pa.float64(),
    "label_entropy": pa.float64(),
}
_SCORED = {
    "loglikelihood": pa.float64(),
    "num_scored_tokens": pa.int32(),
    "is_greedy": pa.bool_(),
    "perplexity": pa.float64(),
}
_GROWN = {"generation": pa.int32(), "tick": pa.timestamp("ms", "UTC")}
_POSTPROCESSED = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
}
_ERROR = pa.struct(
    {"type": pa.string(), "message": pa.string(), "stage": pa.string(), "attempts": pa.int32()}
)


def own_columns(spec: JobSpec, hidden_size: int = 0) -> dict[str, pa.DataType]:
    """b2batch's own columns of a job, by their names without the prefix, in output order."""
    columns = {"row_id": pa.string(), "status": pa.string()}
    if spec.task == "generate":
        columns |= {"generated_text": pa.string(), "finish_reason": pa.string()}
    columns["num_input_tokens"] = pa.int32()
    if spec.task == "generate":
        columns["num_generated_tokens"] = pa.int32()
    if spec.prompt.on_too_long != "error":
        columns["prompt_truncated"] = pa.bool_()
    columns |= _task_columns(spec, hidden_size)
    if spec.review.below is not None:
        columns["needs_review"] = pa.bool_()
    if spec.input.incremental:
        columns |= _GROWN
    for name, type_ in spec.postprocess.columns.items():
        if name in columns or name == "error":
            raise SpecError(f"postprocess.columns: b2batch itself writes a column {name!r}")
        columns[name] = _POSTPROCESSED[type_]
    return {**columns, "error": _ERROR}


def postprocessed_types(spec: JobSpec) -> dict[str, pa.DataType]:
    """The columns that the job's postprocessor gives."""
    return {name: _POSTPROCESSED[type_] for name, type_ in spec.postprocess.columns.items()}


def confidence_column(spec: JobSpec) -> str | None:
    """The own column that says how sure a row's label is, None where the job gives none."""
    if spec.task == "classify":
        return "label_score"
    return None if spec.vote is None else "vote_share"


def _task_columns(spec: JobSpec, hidden_size: int) -> dict[str, pa.DataType]:
    """The columns that only this task has."""
    if spec.task == "embed":
        return {"embedding": pa.list_(pa.float32(), hidden_size)}
    if spec.task == "score":
        return dict(_SCORED)
    columns: dict[str, pa.DataType] = {}
    if spec.task == "classify":
        columns |= _CLASSIFIED
        if spec.classify.threshold is not None:
            columns["labels"] = pa.list_(pa.string())
        return columns
    if spec.structured_outputs.is_set:
        columns |= {"parsed": parsed_type(spec.structured_outputs), "parse_error": pa.string()}
    if spec.sampling.n > 1 or spec.has_batch_lines:
        columns["samples"] = _SAMPLES
    if spec.vote is not None:
        columns |= {"vote": voted_type(spec), "vote_share": pa.float64(), "agreement": pa.float64()}
    if spec.sampling.logprobs is not None or spec.has_batch_lines:
        columns["logprobs"] = _LOGPROBS
    return columns


def parsed_type(spec: StructuredOutputsSpec) -> pa.DataType:
    """The type of the ``parsed`` column; SpecError when a JSON schema fits none."""
    return pa.string() if spec.json is None else arrow_type(spec.json)


def voted_type(spec: JobSpec) -> pa.DataType:
    """The type of what is voted on.

    Raises:
        SpecError: the parsed answer has no such member, or it is a list or an object.
    """
    if spec.vote_on == "text":
        return pa.string()
    type_ = parsed_type(spec.structured_outputs)
    for name in spec.vote_on.split(".")[1:]:
        if not pa.types.is_struct(type_) or type_.get_field_index(name) < 0:
            raise SpecError(f"vote_on: {spec.vote_on}: the schema has no member {name!r} there")
        type_ = type_.field(name).type
    if pa.types.is_nested(type_):
        raise SpecError(
            f"vote_on: {spec.vote_on} is a {type_}; a text, a number or a boolean can be voted on"
        )
    return type_


def output_schema(input_schema: pa.Schema, spec: JobSpec, hidden_size: int = 0) -> pa.Schema:
    """The schema of every part of a job. ``hidden_size`` is the model's, the length of an embedding.

    Carried columns are nullable, since a record that cannot be read has none of them, and lose the
    input's metadata, which describes another table.

    Raises:
        SpecError: a column of ``output.columns`` is not in the input, or a carried column has the
            name of one of b2batch's own.
    """
    carried = [_carried_field(input_schema, name) for name in _carried_names(input_schema, spec)]
    prefix = spec.output.prefix or ""
    own = [
        pa.field(prefix + name, type_, metadata={_OWN: name.encode()})
        for name, type_ in own_columns(spec, hidden_size).items()
    ]
    taken = {field.name for field in own}
    for field in carried:
        if field.name in taken:
            raise SpecError(
                f"the input column {field.name!r} has the name of a column that b2batch writes: "
                "set output.prefix, or leave it out of output.columns"
            )
    return pa.schema([*carried, *own])


def own_name(field: pa.Field) -> str | None:
    """The name without prefix of an own column, or None for a carried one."""
    name = (field.metadata or {}).get(_OWN)
    return name.decode() if name is not None else None


def find_own(schema: pa.Schema, name: str) -> str:
    """The name that own column ``name`` has in ``schema``; KeyError when it is not there."""
    for field in schema:
        if own_name(field) == name:
            return str(field.name)
    raise KeyError(name)


def _carried_names(input_schema: pa.Schema, spec: JobSpec) -> list[str]:
    chosen = spec.output.columns
    names = list(input_schema.names if chosen is None else chosen)
    for name in names:
        if name not in input_schema.names:
            near = difflib.get_close_matches(name, input_schema.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(f"output.columns: the input has no column {name!r}{hint}")
        if names.count(name) > 1:
            raise SpecError(f"output.columns: the column {name!r} stands twice")
    return names


def _carried_field(input_schema: pa.Schema, name: str) -> pa.Field:
    return input_schema.field(name).remove_metadata().with_nullable(True)
