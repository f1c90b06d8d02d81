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
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from b2batch.answers import make_reader
from b2batch.encoding import RowEncoder
from b2batch.engine.deduplication import Deduplicator
from b2batch.engine.engine import Engine
from b2batch.engine.memory import is_out_of_memory
from b2batch.engine.request import AnyRequest, Finished
from b2batch.errors import Fenced, ReplicaSuspect, RowError, RowFailure, RowFault, Stage, StorageError
from b2batch.failpoints import failpoint, is_poison, take_poison
from b2batch.inputs.unit_reader import UnitReader
from b2batch.models.loading import LoadedModel
from b2batch.outputs.parts import Part, PartOrigin, commit_part, encode_part
from b2batch.outputs.schema import output_schema
from b2batch.outputs.store import open_store
from b2batch.rows import (
    Caution,
    CondemnedRow,
    PieceBegun,
    PromptRow,
    ResultRow,
    UnitReport,
    WorkUnit,
)
from b2batch.telemetry import Progress
from b2batch.worker_args import WorkerArgs

logger = logging.getLogger(__name__)

_MAX_UNSAVED = 4  # parts kept for another attempt at their unit

_MAX_FAILURES_TOLD = 20  # by one worker: a million bad rows must not fill a disk with its log


@dataclass(slots=True)
class _OpenUnit:
    """A unit whose rows are on their way through the engine."""

    unit: WorkUnit
    attempt: int
    rows: Sequence[PromptRow]
    columns: pa.Table
    trusts_nan: bool
    pieces: deque[tuple[int, ...]] = field(default_factory=deque)  # not begun yet; see Caution
    num_pieces: int = 0
    truncated: set[str] = field(default_factory=set)  # row ids whose prompt was cut
    results: dict[str, ResultRow] = field(default_factory=dict)

    def columns_of(self, row_id: str) -> Mapping[str, Any]:
        """The input columns of a row, by its ordinal in the file."""
        return self.rows[int(row_id.rpartition(":")[2]) - self.unit.first_row].columns

    @property
    def is_complete(self) -> bool:
        return len(self.results) == len(self.rows)


class Worker:
    """Works on leased units one engine step at a time; used from one thread."""

    def __init__(self, args: WorkerArgs, loaded: LoadedModel, engine: Engine) -> None:
        self._args = args
        self._worker_id = f"{socket.gethostname()}-{os.getpid()}"
        self._encoder = RowEncoder(args.spec, loaded.codec, loaded.checkpoint.generation_config)
        self._reader = UnitReader(args.files, args.input_schema, args.spec.input)
        self._store = open_store(args.output_uri, args.run_id)
        self._answers = make_reader(args.spec, self._encoder, engine, loaded.codec.tokenizer)
        self._engine = Deduplicator(engine) if args.spec.dedup else engine
        self._step_size = {
            "max_num_seqs": engine.limits.max_num_seqs,
            "max_num_batched_tokens": engine.limits.max_num_batched_tokens,
        }
        hidden_size = loaded.model.config.get_text_config().hidden_size
        self._schema = output_schema(args.input_schema, args.spec, hidden_size)
        self._open: dict[int, _OpenUnit] = {}
        self._unit_of: dict[str, _OpenUnit] = {}  # row id → the unit it belongs to
        self._unsaved: dict[int, Part] = {}  # parts that the store would not take, by unit
        self._poison: set[str] = set()  # row ids; see failpoints
        self._num_nan_in_a_row = 0  # rows of units that do not trust it
        self._progress = Progress()
        self._num_failures_told = 0

    @property
    def wants_unit(self) -> bool:
        """Whether fewer rows wait than two batches hold, so that more are needed to keep it full."""
        return self._engine.num_waiting < 2 * self._engine.max_num_seqs

    @property
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        return not self._open

    @property
    def next_piece(self) -> PieceBegun | None:
        """The piece that ``begin_piece`` would begin, once all before it is answered."""
        open_unit = self._unit_in_pieces()
        if open_unit is None or self._engine.has_work:
            return None
        number = open_unit.num_pieces - len(open_unit.pieces)
        return PieceBegun(open_unit.unit.index, open_unit.attempt, number)

    def progress(self) -> Progress:
        """Counters since the worker was built."""
        num_reused = self._engine.num_reused if isinstance(self._engine, Deduplicator) else 0
        return self._progress + Progress(num_running=self._engine.num_running, num_reused_rows=num_reused)

    def add_unit(
        self, unit: WorkUnit, attempt: int, caution: Caution | None = None, *, trusts_nan: bool = False
    ) -> None:
        """Read a unit's rows and queue those that can be answered; under ``caution`` none yet.

        ``trusts_nan``: a batch without one finite logit is its rows' fault, as it was so elsewhere.

        Raises:
            DriftError, InputError: the input file is not as it was planned.
        """
        failpoint("F4")
        read = self._reader.read(unit)
        open_unit = _OpenUnit(unit, attempt, read.rows, read.columns, trusts_nan)
        if unit.index in self._unsaved:
            self._open[unit.index] = open_unit
        elif caution is None:
            self._admit(open_unit, read.rows)
        else:
            open_unit.pieces.extend(caution.pieces)
            open_unit.num_pieces = len(caution.pieces)
            self._condemn(open_unit, caution.condemned)
            self._open[unit.index] = open_unit

    def begin_piece(self) -> None:
        """Queue the rows of the next piece of the unit that is under caution."""
        open_unit = self._unit_in_pieces()
        if open_unit is not None:
            self._admit(open_unit, [open_unit.rows[offset] for offset in open_unit.pieces.popleft()])

    def drop_unit(self, unit_index: int) -> None:
        """Leave a unit: another replica has committed it, or this attempt cannot go on."""
        open_unit = self._open.pop(unit_index, None)
        self._unsaved.pop(unit_index, None)
        if open_unit is None:
            return
        for row in open_unit.rows:
            if self._unit_of.get(row.row_id) is open_unit:
                del self._unit_of[row.row_id]
                self._engine.cancel(row.row_id)

    def step(self) -> list[UnitReport]:
        """One engine step, then commit what it completed.

        Raises:
            ReplicaSuspect: no row of a whole batch had finite logits.
        """
        if self._engine.has_work:
            failpoint("F5")
            if self._poison & self._unit_of.keys():
                take_poison()
            for finished in self._run_engine():
                self._take(finished)
            self._check_sanity()
        complete = (unit for unit in self._open.values() if self._is_over(unit))
        return [self._commit(unit) for unit in list(complete)]

    def _run_engine(self) -> list[Finished]:
        """The engine's step. Out of memory it goes on with half the batch; a row that is alone fails."""
        try:
            return self._engine.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).partition("\n")[0]
        self._progress += Progress(num_out_of_memory=1)
        alone = self._engine.shrink()
        if alone is not None:
            failure = RowError(RowFault.OOM, f"this row alone needs too much: {message}", Stage.GENERATE)
            self._fail(self._unit_of.pop(alone), alone, failure.failure)
        return []

    def _check_sanity(self) -> None:
        """A whole batch without finite logits says more about the replica than about its rows."""
        num_rows = self._num_nan_in_a_row
        if num_rows >= self._engine.max_num_seqs or (num_rows > 1 and not self._engine.num_running):
            raise ReplicaSuspect(f"none of {num_rows} rows that ran together had finite logits")

    def _unit_in_pieces(self) -> _OpenUnit | None:
        return next((unit for unit in self._open.values() if unit.pieces), None)

    def _is_over(self, open_unit: _OpenUnit) -> bool:
        return open_unit.is_complete or open_unit.unit.index in self._unsaved

    def _condemn(self, open_unit: _OpenUnit, condemned: Iterable[CondemnedRow]) -> None:
        for row in condemned:
            message = (
                f"the replica died each of the {row.num_deaths} times that this row ran alone: {row.detail}"
            )
            failure = RowFailure(RowFault.WORKER_CRASH, message[:2000], Stage.CRASH, open_unit.attempt)
            self._fail(open_unit, open_unit.rows[row.offset].row_id, failure)

    def _admit(self, open_unit: _OpenUnit, rows: Iterable[PromptRow]) -> None:
        """Hand rows to the engine, or their failures to the results. All are encoded before one is queued."""
        requests = [request for row in rows if (request := self._prepare(open_unit, row))]
        self._open[open_unit.unit.index] = open_unit
        for request in requests:
            self._queue(open_unit, request)

    def _prepare(self, open_unit: _OpenUnit, row: PromptRow) -> AnyRequest | None:
        """The row's request, or None once its failure stands among the results."""
        if row.failure is not None:
            self._fail(open_unit, row.row_id, row.failure)
            return None
        try:
            encoded = self._encoder.encode(row)
        except RowError as error:
            self._fail(open_unit, row.row_id, error.failure)
            return None
        if is_poison(row.columns):
            self._poison.add(row.row_id)
        if encoded.prompt_truncated:
            open_unit.truncated.add(row.row_id)
        return encoded.request

    def _queue(self, open_unit: _OpenUnit, request: AnyRequest) -> None:
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
        try:
            generation = self._answers.read(
                finished, open_unit.columns_of(row_id), prompt_truncated=row_id in open_unit.truncated
            )
        except RowError as error:
            self._fail(open_unit, row_id, error.failure)
            is_doubtful = error.failure.fault is RowFault.NAN and not open_unit.trusts_nan
            self._num_nan_in_a_row = self._num_nan_in_a_row + 1 if is_doubtful else 0
            return
        self._num_nan_in_a_row = 0
        open_unit.results[row_id] = ResultRow(row_id, generation)
        self._progress += Progress(
            num_rows=1,
            num_input_tokens=generation.num_input_tokens,
            num_generated_tokens=generation.num_generated_tokens,
        )

    def _fail(self, open_unit: _OpenUnit, row_id: str, failure: RowFailure) -> None:
        if self._num_failures_told < _MAX_FAILURES_TOLD:
            self._num_failures_told += 1
            logger.warning("row=%s %s: %s", row_id, failure.fault, failure.message)
            if self._num_failures_told == _MAX_FAILURES_TOLD:
                logger.warning("further failed rows are counted, not logged")
        open_unit.results[row_id] = ResultRow(row_id, failure=failure)
        self._progress += Progress(num_rows=1, num_error_rows=1)

    def _commit(self, open_unit: _OpenUnit) -> UnitReport:
        """Write and commit a complete unit. A store that fails costs this attempt, not the worker."""
        del self._open[open_unit.unit.index]
        unit, attempt = open_unit.unit, open_unit.attempt
        try:
            part = self._unsaved.pop(unit.index, None) or self._encode(open_unit)
            failpoint("F6")
            return self._put(replace(part, attempt=attempt))
        except Fenced:
            raise
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            return UnitReport(unit.index, attempt, error=(type(error).__name__, str(error), trace))

    def _encode(self, open_unit: _OpenUnit) -> Part:
        return encode_part(
            open_unit.unit,
            open_unit.rows,
            open_unit.columns,
            list(open_unit.results.values()),
            self._schema,
            self._origin(open_unit.unit, open_unit.attempt),
        )

    def _put(self, part: Part) -> UnitReport:
        try:
            return commit_part(self._store, part)
        except StorageError:
            self._unsaved[part.unit.index] = part  # the next attempt here has only this to do
            if len(self._unsaved) > _MAX_UNSAVED:
                del self._unsaved[next(iter(self._unsaved))]
            raise

    def _origin(self, unit: WorkUnit, attempt: int) -> PartOrigin:
        file = self._args.files[unit.file_index]
        grown = {"generation": file.generation, "tick": file.tick} if file.generation else {}
        return PartOrigin(
            run_id=self._args.run_id,
            file={"path": file.path, "size": file.size, "fingerprint": file.fingerprint, **grown},
            epoch=self._args.epoch,
            attempt=attempt,
            worker_id=self._worker_id,
            provenance={**self._args.provenance, "step": self._step_size},
        )
