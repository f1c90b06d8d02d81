"""What a job would do, before it does it: rows, prompt lengths, the model, the output as it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from b2batch.encoding import EncodedRow, RowEncoder
from b2batch.engine.memory_plan import MemoryFit, MemoryPlan
from b2batch.errors import IntegrityError, OutputError, RowError, RowFault
from b2batch.inputs.sample import spread_rows
from b2batch.models.facts import ModelFacts, model_facts
from b2batch.outputs.drift import check_drift
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.preflight import PreparedJob, prepare_job
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec

SAMPLE_ROWS = 2_000
_NUM_BINS = 8


@dataclass(frozen=True, slots=True)
class Bin:
    """Prompts of ``low`` to ``high`` tokens, both inclusive."""

    low: int
    high: int
    num_prompts: int


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Token counts of the prompts of a sample, as the model gets them. Failed rows have no length.

    ``num_truncated`` prompts were cut by ``prompt.on_too_long``. ``num_too_long`` rows have no room
    for an answer and become row errors; ``num_short_of_room`` have less room than ``max_tokens``, so
    their answers may be cut by the context.
    """

    num_rows: int
    is_whole_input: bool
    median: int
    p99: int
    longest: int
    mean: float
    num_truncated: int
    num_too_long: int
    num_short_of_room: int
    failures: dict[str, int]
    example: str
    histogram: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """What the output directory holds now: ``new``, ``resumes``, ``finished``, ``grows`` or ``other``."""

    state: str
    num_units_committed: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A job's plan, for eyes. ``num_input_tokens`` is extrapolated from the sample.

    ``fit`` is how the model fits the GPU that was described, if one was.
    """

    name: str
    run_id: str
    files: tuple[str, ...]
    num_rows: int
    num_units: int
    num_blank: int
    columns: dict[str, str]
    lengths: PromptLengths
    num_input_tokens: int
    max_generated_tokens: int | None
    model: ModelFacts
    workspace_bytes: int
    fit: MemoryFit | None
    uses_chat: bool
    sampling: dict[str, Any]
    output: str
    standing: Standing


def estimate_job(spec: JobSpec, gpu_bytes: int | None = None) -> Estimate:
    """Plan a job fully and look at a sample of its prompts; no GPU, no Ray, no weight.

    Args:
        gpu_bytes: memory of the GPU that the job is to run on, to see whether the model fits.

    Raises:
        CallerError: the job is not sound.
    """
    job = prepare_job(spec)
    memory = MemoryPlan.of(spec, job.checkpoint, job.codec.max_model_len)
    lengths = _prompt_lengths(job, spread_rows(job.plan, spec.input, SAMPLE_ROWS))
    sampling = job.encoder.sampling
    num_rows = job.plan.num_rows
    return Estimate(
        name=spec.name,
        run_id=job.record.run_id,
        files=tuple(file.uri for file in job.plan.files),
        num_rows=num_rows,
        num_units=len(job.plan.units),
        num_blank=job.plan.num_blank,
        columns={field.name: str(field.type) for field in job.plan.schema},
        lengths=lengths,
        num_input_tokens=round(lengths.mean * num_rows),
        max_generated_tokens=_max_generated_tokens(spec, sampling.max_tokens, num_rows),
        model=model_facts(job.checkpoint, job.codec, spec.model),
        workspace_bytes=memory.workspace_bytes,
        fit=None if gpu_bytes is None else memory.on(gpu_bytes),
        uses_chat=job.encoder.uses_chat,
        sampling=sampling.model_dump(mode="json", exclude_defaults=True, exclude={"from_model"}),
        output=open_store(spec.output.path, job.record.run_id).uri,
        standing=_standing(job),
    )


def _max_generated_tokens(spec: JobSpec, max_tokens: int | None, num_rows: int) -> int | None:
    if spec.task != "generate":
        return 0
    return max_tokens and max_tokens * spec.sampling.n * num_rows


def _prompt_lengths(job: PreparedJob, rows: Iterable[PromptRow]) -> PromptLengths:
    lengths: list[int] = []
    num_truncated = 0
    failures: Counter[str] = Counter()
    example = ""
    for row in rows:
        try:
            encoded = encode_row(job.encoder, row)
        except RowError as error:
            failures[error.failure.fault] += 1
            example = example or f"{row.row_id}: {error.failure.fault}: {error}"
        else:
            lengths.append(len(encoded.request.prompt))
            num_truncated += encoded.prompt_truncated
    lengths.sort()
    num_sampled = len(lengths) + failures.total()
    wanted = job.encoder.num_answer_tokens
    return PromptLengths(
        num_rows=num_sampled,
        is_whole_input=num_sampled == job.plan.num_rows,
        median=_quantile(lengths, 0.5),
        p99=_quantile(lengths, 0.99),
        longest=_quantile(lengths, 1.0),
        mean=sum(lengths) / len(lengths) if lengths else 0.0,
        num_truncated=num_truncated,
        num_too_long=failures[RowFault.PROMPT_TOO_LONG],
        num_short_of_room=sum(length + wanted > job.codec.max_model_len for length in lengths),
        failures=dict(failures),
        example=example,
        histogram=histogram(lengths),
    )


def encode_row(encoder: RowEncoder, row: PromptRow) -> EncodedRow:
    """The row's request; RowError also for a row that could not be read."""
    if row.failure is not None:
        raise RowError(row.failure.fault, row.failure.message, row.failure.stage)
    return encoder.encode(row)


def histogram(lengths: Sequence[int]) -> tuple[Bin, ...]:
    """At most 8 bins of equal width that cover sorted ``lengths``."""
    if not lengths:
        return ()
    low, high = lengths[0], lengths[-1]
    width = -(-(high - low + 1) // _NUM_BINS)
    counts = Counter((length - low) // width for length in lengths)
    last = (high - low) // width
    return tuple(
        Bin(low + i * width, min(high, low + (i + 1) * width - 1), counts[i]) for i in range(last + 1)
    )


def _quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that ``share`` of all do not exceed; 0 of nothing."""
    return ordered[max(0, -(-int(len(ordered) * share * 100) // 100) - 1)] if ordered else 0


def _standing(job: PreparedJob) -> Standing:
    """What a run would meet in its output directory."""
    store = open_store(job.spec.output.path, job.record.run_id)
    try:
        directory = RunDirectory.existing(store)
    except OutputError:
        return Standing("new")
    try:
        check_drift(directory.record, job.record, store.uri)
    except IntegrityError as error:
        return Standing("other", detail=str(error))
    state = "finished" if directory.success() else "resumes"
    if job.extension is not None and job.extension.base_digest:
        state = "grows"
    return Standing(state, directory.num_committed())
