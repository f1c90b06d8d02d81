"""One replica's work, without Ray: units of rows in, committed parts out.

    unit ──read──► rows ──render, encode──► requests ──► engine ──► completions ──decode──► results
                     │ a row that fails on the way                                   │
                     └──────────────────────────► its error ─────────────────────────┴──► part ──► commit

The engine is fed from the next unit before the last one drains, so its batch stays full across
units; each unit is committed by itself as soon as its last row is answered. A row's fault becomes
that row's result. What is not a row's fault (a file that changed, a full disk) fails the attempt at
the unit, and only what leaves the engine unusable ends the worker.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from b2batch.encoding import RowEncoder
from b2batch.engine import guard, packing
from b2batch.engine.engine import Engine
from b2batch.engine.memory import resolve_limits
from b2batch.engine.request import Completion, Finished, Request
from b2batch.engine.runner import KVShape
from b2batch.errors import Fenced, RowError, RowFailure, RowFault, Stage
from b2batch.failpoints import failpoint
from b2batch.inputs.files import InputFile
from b2batch.inputs.unit_reader import UnitReader
from b2batch.models.loading import LoadedModel, load_model
from b2batch.models.tokenizer import Tokenizer
from b2batch.outputs.parts import PartOrigin, commit_part, encode_part
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.rows import Generation, PromptRow, ResultRow, Sample, UnitReport, WorkUnit
from b2batch.spec import JobSpec
from b2batch.telemetry import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerArgs:
    """All that a worker needs to know of a run; small, and safe to pickle."""

    spec: JobSpec
    files: tuple[InputFile, ...]
    input_schema: pa.Schema
    output_uri: str
    run_id: str
    epoch: int
    provenance: Mapping[str, Any]


@dataclass(slots=True)
class _OpenUnit:
    """A unit whose rows are on their way through the engine."""

    unit: WorkUnit
    attempt: int
    rows: Sequence[PromptRow]
    columns: pa.Table
    truncated: set[str] = field(default_factory=set)  # row ids whose prompt was cut
    results: dict[str, ResultRow] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return len(self.results) == len(self.rows)


def make_worker(args: WorkerArgs) -> Worker:
    """Load the model and build the worker; what a replica runs first.

    Raises:
        CallerError: the checkpoint or the spec cannot be used here.
    """
    torch.set_num_threads(max(1, int(args.spec.cluster.cpus_per_replica)))
    loaded = load_model(args.spec.model)
    return Worker(args, loaded, make_engine(args.spec, loaded))


def make_engine(spec: JobSpec, loaded: LoadedModel) -> Engine:
    """An engine for a loaded model, with its limits settled and its arithmetic checked."""
    codec = loaded.codec
    guard.refuse_windows(loaded.model, codec.max_model_len)
    expected = guard.reference_logits(loaded.model)
    if packing.can_pack(loaded.model):
        packing.pack_linears(loaded.model)
    limits = resolve_limits(
        spec.engine, KVShape.of(loaded.model), codec.max_model_len, next(loaded.model.parameters()).device
    )
    engine = Engine(
        loaded.model,
        limits,
        max_model_len=codec.max_model_len,
        stop_token_ids=codec.stop_token_ids,
        decode=codec.tokenizer.decode,
    )
    guard.check_runner(engine.runner, expected)
    logger.info(
        "engine ready: %d sequences, %d tokens a step, %d tokens of KV",
        limits.max_num_seqs,
        limits.max_num_batched_tokens,
        limits.kv_cache_tokens,
    )
    return engine


class Worker:
    """Works on leased units one engine step at a time; used from one thread."""

    def __init__(self, args: WorkerArgs, loaded: LoadedModel, engine: Engine) -> None:
        self._args = args
        self._worker_id = f"{socket.gethostname()}-{os.getpid()}"
        self._tokenizer = loaded.codec.tokenizer
        self._engine = engine
        self._encoder = RowEncoder(args.spec, loaded.codec, loaded.checkpoint.generation_config)
        self._reader = UnitReader(args.files, args.input_schema, args.spec.input)
        self._store = open_store(args.output_uri, args.run_id)
        self._schema = output_schema(args.input_schema, args.spec)
        self._open: dict[int, _OpenUnit] = {}
        self._unit_of: dict[str, _OpenUnit] = {}  # row id → the unit it belongs to
        self._progress = Progress()

    @property
    def wants_unit(self) -> bool:
        """Whether fewer rows wait than two batches hold, so that more are needed to keep it full."""
        return self._engine.num_waiting < 2 * self._engine.max_num_seqs

    @property
    def idle(self) -> bool:
        return not self._open

    def progress(self) -> Progress:
        """Counters since the worker was built."""
        return self._progress + Progress(num_running=self._engine.num_running)

    def add_unit(self, unit: WorkUnit, attempt: int) -> None:
        """Read a unit's rows and queue those that can be answered.

        Raises:
            DriftError, InputError: the input file is not as it was planned.
        """
        failpoint("F4")
        read = self._reader.read(unit)
        open_unit = _OpenUnit(unit, attempt, read.rows, read.columns)
        requests = [request for row in read.rows if (request := self._prepare(open_unit, row))]
        self._open[unit.index] = open_unit
        for request in requests:
            self._queue(open_unit, request)

    def step(self) -> list[UnitReport]:
        """One engine step, then commit what it completed."""
        if self._engine.has_work:
            failpoint("F5")
            for finished in self._engine.step():
                self._take(finished)
        return [self._commit(unit) for unit in list(self._open.values()) if unit.is_complete]

    def _prepare(self, open_unit: _OpenUnit, row: PromptRow) -> Request | None:
        """The row's request, or None once its failure stands among the results."""
        if row.failure is not None:
            self._fail(open_unit, row.row_id, row.failure)
            return None
        try:
            encoded = self._encoder.encode(row)
        except RowError as error:
            self._fail(open_unit, row.row_id, error.failure)
            return None
        if encoded.prompt_truncated:
            open_unit.truncated.add(row.row_id)
        return encoded.request

    def _queue(self, open_unit: _OpenUnit, request: Request) -> None:
        """Hand a request to the engine, which refuses tokens that the model does not have."""
        try:
            self._engine.add(request)
        except ValueError as error:
            failure = RowError(RowFault.SAMPLING, str(error), Stage.ENCODE).failure
            self._fail(open_unit, request.request_id, failure)
        else:
            self._unit_of[request.request_id] = open_unit

    def _take(self, finished: Finished) -> None:
        """Book an answered row."""
        row_id = finished.request_id
        open_unit = self._unit_of.pop(row_id)
        failure = _failure_of(finished.completions)
        if failure is not None:
            self._fail(open_unit, row_id, failure)
            return
        samples = tuple(read_sample(completion, self._tokenizer) for completion in finished.completions)
        generation = Generation(finished.num_prompt_tokens, samples, row_id in open_unit.truncated)
        open_unit.results[row_id] = ResultRow(row_id, generation)
        self._progress += Progress(
            num_rows=1,
            num_input_tokens=generation.num_input_tokens,
            num_generated_tokens=generation.num_generated_tokens,
        )

    def _fail(self, open_unit: _OpenUnit, row_id: str, failure: RowFailure) -> None:
        logger.debug("row=%s %s: %s", row_id, failure.fault, failure.message)
        open_unit.results[row_id] = ResultRow(row_id, failure=failure)
        self._progress += Progress(num_rows=1, num_error_rows=1)

    def _commit(self, open_unit: _OpenUnit) -> UnitReport:
        """Write and commit a complete unit. A store that fails costs this attempt, not the worker."""
        del self._open[open_unit.unit.index]
        unit, attempt = open_unit.unit, open_unit.attempt
        try:
            part = encode_part(
                unit,
                open_unit.rows,
                open_unit.columns,
                list(open_unit.results.values()),
                self._schema,
                self._origin(unit, attempt),
            )
            failpoint("F6")
            return commit_part(self._store, part)
        except Fenced:
            raise
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            return UnitReport(unit.index, attempt, error=(type(error).__name__, str(error), trace))

    def _origin(self, unit: WorkUnit, attempt: int) -> PartOrigin:
        file = self._args.files[unit.file_index]
        return PartOrigin(
            run_id=self._args.run_id,
            file={"path": file.path, "size": file.size, "fingerprint": file.fingerprint},
            epoch=self._args.epoch,
            attempt=attempt,
            worker_id=self._worker_id,
            provenance=self._args.provenance,
        )


def read_sample(completion: Completion, tokenizer: Tokenizer) -> Sample:
    """A completion as text, without the stop token or the stop string that ended it."""
    text = tokenizer.decode(completion.token_ids[: completion.num_text_tokens])
    text = text[: len(text) - completion.num_cut_chars]
    return Sample(text, completion.token_ids, completion.finish_reason, completion.logprobs)


def _failure_of(completions: Sequence[Completion]) -> RowFailure | None:
    errors = [completion.error for completion in completions if completion.error]
    return RowFailure(RowFault.NAN, errors[0], Stage.GENERATE) if errors else None
