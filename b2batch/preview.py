"""The first prompts of a job as the model reads them, and its answers, from an engine in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from b2batch.encoding import RowEncoder
from b2batch.engine.request import Request
from b2batch.errors import RowError
from b2batch.inputs.plan import make_plan
from b2batch.inputs.prompts import Prompt
from b2batch.inputs.sample import first_rows
from b2batch.job import check_schema
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.families import family_of
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec


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
    plan = make_plan(looked_at)
    check_schema(spec, plan.schema)
    requests: list[Request] = []
    rows = [_encode(encoder, row, requests) for row in first_rows(plan, looked_at, limit)]
    return _answer(spec, rows, requests) if generate and requests else rows


def _encode(encoder: RowEncoder, row: PromptRow, requests: list[Request]) -> PreviewRow:
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


def _answer(spec: JobSpec, rows: Sequence[PreviewRow], requests: Sequence[Request]) -> list[PreviewRow]:
    # torch takes seconds to import: prompts alone are shown without it.
    from b2batch.models.loading import load_model
    from b2batch.worker import make_engine, read_sample

    loaded = load_model(spec.model)
    few = spec.engine.model_copy(update={"max_num_seqs": max(1, len(requests) * spec.sampling.n)})
    engine = make_engine(spec.model_copy(update={"engine": few}), loaded)
    for request in requests:
        engine.add(request)
    answers = {}
    while engine.has_work:
        for finished in engine.step():
            answers[finished.request_id] = finished.completions[0]
    answered = []
    for row in rows:
        completion = answers.get(row.row_id)
        if completion is not None:
            sample = read_sample(completion, loaded.codec.tokenizer)
            error = completion.error or ""
            row = replace(row, answer=sample.text, finish_reason=sample.finish_reason.value, error=error)
        answered.append(row)
    return answered
