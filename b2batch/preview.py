"""The first prompts of a job as the model reads them, and its answers, from an engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from b2batch.encoding import RowEncoder
from b2batch.engine.request import AnyRequest, Finished
from b2batch.errors import RowError
from b2batch.inputs.plan import make_plan
from b2batch.inputs.prompts import Prompt
from b2batch.inputs.sample import first_rows
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.families import family_of
from b2batch.preflight import check_schema
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec

if TYPE_CHECKING:
    from b2batch.answers import AnswerReader

_MAX_SHOWN = 10


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row on its way. ``messages`` when it goes through the chat format, else ``text``.

    ``error`` is what the row would get; ``answer`` is None where nothing was generated.
    """

    row_id: str
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None
    num_input_tokens: int = 0
    prompt_truncated: bool = False
    answer: str | None = None
    finish_reason: str = ""
    error: str = ""


def preview_job(spec: JobSpec, num_rows: int, *, generate: bool) -> list[PreviewRow]:
    """The first ``num_rows`` rows, rendered and, if asked, answered as a run would answer them.

    Raises:
        CallerError: the job is not sound.
    """
    checkpoint = open_checkpoint(spec.model, weights=False)
    codec = family_of(checkpoint).codec(checkpoint, spec.model)
    encoder = RowEncoder(spec, codec, checkpoint.generation_config)
    given = spec.input
    limit = num_rows if given.limit is None else min(num_rows, given.limit)
    looked_at = given.model_copy(update={"limit": limit, "fingerprint": "fast"})
    plan = make_plan(looked_at, tick=spec.tick)
    check_schema(spec, plan.schema, checkpoint)
    requests: list[AnyRequest] = []
    rows = [_encode(encoder, row, requests) for row in first_rows(plan, looked_at, limit)]
    return _answer(spec, encoder, rows, requests) if generate and requests else rows


def _encode(encoder: RowEncoder, row: PromptRow, requests: list[AnyRequest]) -> PreviewRow:
    """The row rendered; its request goes to ``requests``."""
    if row.failure is not None:
        return PreviewRow(row.row_id, error=f"{row.failure.fault}: {row.failure.message}")
    shown: dict[str, Any] = {}
    try:
        shown = _shown(encoder.render(row), encoder.uses_chat)
        encoded = encoder.encode(row)
    except RowError as error:
        return PreviewRow(row.row_id, **shown, error=f"{error.failure.fault}: {error}")
    requests.append(encoded.request)
    return PreviewRow(
        row.row_id,
        **shown,
        num_input_tokens=len(encoded.request.prompt),
        prompt_truncated=encoded.prompt_truncated,
    )


def _shown(prompt: Prompt, uses_chat: bool) -> dict[str, Any]:
    if uses_chat:
        return {"messages": tuple(asdict(message) for message in prompt.messages)}
    return {"text": prompt.text}


def _answer(
    spec: JobSpec, encoder: RowEncoder, rows: Sequence[PreviewRow], requests: Sequence[AnyRequest]
) -> list[PreviewRow]:
    # torch takes seconds to import: prompts alone are shown without it.
    from b2batch.answers import make_reader
    from b2batch.engine.heap import return_freed_memory
    from b2batch.engine_start import make_engine
    from b2batch.models.loading import load_model

    return_freed_memory()
    loaded = load_model(spec.model, spec.cluster.gpus_per_model)
    few = spec.engine.model_copy(update={"max_num_seqs": max(1, len(requests) * spec.sampling.n)})
    engine = make_engine(spec.model_copy(update={"engine": few}), loaded)
    reader = make_reader(spec, encoder, engine, loaded.codec.tokenizer)
    for request in requests:
        engine.add(request)
    finished: dict[str, Finished] = {}
    while engine.has_work:
        finished |= {done.request_id: done for done in engine.step()}
    return [_answered(row, reader, finished[row.row_id]) if row.row_id in finished else row for row in rows]


def _answered(row: PreviewRow, reader: AnswerReader, finished: Finished) -> PreviewRow:
    try:
        generation = reader.read(finished)
    except RowError as error:
        return replace(row, error=f"{error.failure.fault}: {error}")
    if generation.samples:
        sample = generation.samples[0]
        return replace(row, answer=sample.text, finish_reason=sample.finish_reason.value)
    return replace(row, answer=", ".join(f"{name} {_brief(v)}" for name, v in generation.columns.items()))


def _brief(value: Any) -> str:
    """A column's value on a line: numbers rounded, of many only the first."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        more = ", …" if len(value) > _MAX_SHOWN else ""
        return f"[{', '.join(map(_brief, value[:_MAX_SHOWN]))}{more}]"
    return str(value)
