"""A job from its spec to its result: the composition root; nothing else knows all parts.

preflight   spec, checkpoint, tokenizer, input, columns, output: refused here, before any replica
plan        input files → units; the run's identity = settings that matter + plan + weights
resume      units that have a part already are done
drive       the others → replicas → parts
finalise    all rows accounted for → _SUCCESS, last
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from b2batch.encoding import RowEncoder
from b2batch.errors import (
    B2BatchError,
    Drained,
    Fenced,
    InputError,
    NothingToDo,
    PlanOutdated,
    SpecError,
    StorageError,
)
from b2batch.inputs.plan import Plan
from b2batch.inputs.prompts import PromptRenderer
from b2batch.inputs.schema import check_columns
from b2batch.labelling.judgement import judge
from b2batch.models.checkpoint import Checkpoint, open_checkpoint
from b2batch.models.facts import gpu_dtype
from b2batch.models.families import PromptCodec, family_of
from b2batch.models.footprint import Architecture, weight_bytes
from b2batch.notify.announcement import Announcement
from b2batch.outputs.finalise import finalise, remove_superseded
from b2batch.outputs.generation import Extension
from b2batch.outputs.lease import Epoch
from b2batch.outputs.lock import when_free
from b2batch.outputs.record import RunRecord
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import output_schema
from b2batch.outputs.status import RunState, Status, write_status
from b2batch.outputs.store import Store, open_store
from b2batch.outputs.success import Success, allowed_errors
from b2batch.planning import RunMaker, plan_run
from b2batch.rows import UnitCounts, WorkUnit
from b2batch.spec import JobSpec, mask_env
from b2batch.telemetry import Progress

logger = logging.getLogger(__name__)

_STATUS_INTERVAL_S = 5.0
_USUAL_ANSWER_TOKENS = 1024
_PLAN_TRIES = 3
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


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a running job is. Rows include those that earlier starts committed."""

    num_rows: int
    num_rows_done: int
    num_error_rows: int
    num_units: int
    num_units_committed: int
    live: Progress
    num_ready: int
    num_starting: int
    num_lost: int


@dataclass(frozen=True, slots=True)
class JobResult:
    """A finished job. ``num_rows_resumed`` of its rows were committed by earlier starts.

    ``num_attempts`` are the units that this start began; ``num_rows_again`` the rows of those among
    them that had been begun before: what deaths, failures and copies at the end cost at most.
    """

    output: str
    run_id: str
    counts: UnitCounts
    num_skipped_blank: int
    wall_s: float
    num_rows_resumed: int
    num_replicas_lost: int = 0
    num_attempts: int = 0
    num_rows_again: int = 0


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How this start of a job is to be done; none of it changes a result.

    ``wait_lock_s`` is how long it waits for another driver to end before it gives up.
    ``forced_code`` is what the process ends with once its caller cuts the run short by an exception of
    its own, for ``status.json``. It is asked for, since Ray turns a SystemExit raised in a signal
    handler into one with code 1.
    """

    overwrite: bool = False
    takeover: bool = False
    wait_lock_s: float = 0.0
    allow_foreign: bool = False
    on_progress: Callable[[JobProgress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    forced_code: Callable[[], int | None] = lambda: None


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


def run_job(spec: JobSpec, options: RunOptions | None = None) -> JobResult:
    """Run a job to its end, or go on with it: the same call after any crash resumes.

    Raises:
        CallerError: refused before anything ran.
        IntegrityError: the input or the spec is not what the existing output was made from.
        RunLocked: another live driver works on this output.
        NothingToDo: an incremental job's input has nothing new, or the tick is finished.
        Drained: ``options.should_stop`` asked for it.
        ErrorBudgetExceeded: finished, but with more failed rows than allowed.
        ClusterError: replicas could not be had or kept; the run can be resumed.
    """
    with Announcement(spec) as announcement:
        return _run_job(spec, options or RunOptions(), announcement)


def _run_job(spec: JobSpec, options: RunOptions, announcement: Announcement) -> JobResult:
    started_s = time.monotonic()
    try:
        job, store, held = _planned_and_taken(spec, options)
    except NothingToDo:
        announcement.nothing_new()
        raise
    announcement.store = store
    if isinstance(held, Success):
        announcement.nothing_new()
        logger.info("%s: run %s is finished already; nothing to do", store.uri, job.record.run8)
        return _result(job, store, held.counts, started_s, num_rows_resumed=held.counts.num_rows)
    directory, epoch = held
    with epoch:
        return _Run(job, store, directory, epoch, options, started_s).drive()


def _planned_and_taken(
    spec: JobSpec, options: RunOptions
) -> tuple[PreparedJob, Store, tuple[RunDirectory, Epoch] | Success]:
    """The job and what ``_take`` gives; planned again where another command changed the run meanwhile."""
    for tries_left in reversed(range(_PLAN_TRIES)):
        job = prepare_job(spec, options.overwrite)
        if options.should_stop():
            raise Drained("stopped before anything was started; the same command starts it")
        store = open_store(spec.output.path, job.record.run_id)
        try:
            take = partial(_take, job, store, options)
            return job, store, when_free(take, options.wait_lock_s, options.should_stop)
        except PlanOutdated as outdated:
            if not tries_left:
                raise
            logger.info("%s; it is planned again", outdated)
    raise AssertionError("unreachable")


def _take(job: PreparedJob, store: Store, options: RunOptions) -> tuple[RunDirectory, Epoch] | Success:
    """The run's directory and its lease; what ``_SUCCESS`` says where nothing is left to do."""
    directory = RunDirectory.open(
        store,
        job.record,
        job.plan.to_bytes(),
        extension=job.extension,
        overwrite=options.overwrite,
        takeover=options.takeover,
        allow_foreign=options.allow_foreign,
    )
    success = directory.success()
    if success is not None:
        _refuse_what_is_done(job, success)
    if success is not None and not success.partial:  # a partial one may be within today's budget
        return success
    return directory, directory.take_epoch(takeover=options.takeover)


def _refuse_what_is_done(job: PreparedJob, success: Success) -> None:
    """A finished tick, and an incremental run without anything new, are nothing to begin."""
    tick = job.spec.tick
    is_its_own = not job.spec.input.incremental or tick in job.plan.ticks
    if tick and not is_its_own:
        raise NothingToDo(f"{job.spec.output.path}: tick {tick}: nothing is new in the input")
    if not success.partial and tick:
        raise NothingToDo(f"{job.spec.output.path}: tick {tick} is finished")
    if not success.partial and job.spec.input.incremental:
        raise NothingToDo(f"{job.spec.output.path}: nothing is new in the input")


class _Run:
    """One start of a driver that holds the lease."""

    def __init__(
        self,
        job: PreparedJob,
        store: Store,
        directory: RunDirectory,
        epoch: Epoch,
        options: RunOptions,
        started_s: float,
    ) -> None:
        self._job = job
        self._store = store
        self._directory = directory
        self._epoch = epoch
        self._options = options
        self._started_s = started_s
        self._started = _utc_now()
        self._resumed = UnitCounts()
        self._num_resumed_units = 0
        self._counts = UnitCounts()
        self._num_units_committed = 0
        self._num_ready = 0
        self._num_lost = self._num_attempts = self._num_rows_again = self._num_out_of_memory = 0
        self._num_reused_rows = 0
        self._next_status_s = 0.0

    def drive(self) -> JobResult:
        """Drive the run to its end; ``status.json`` tells how it ended in any case."""
        try:
            self._run_pending()
            self._epoch.check_not_fenced()
            self._write_status(RunState.FINALISING)
            if self._job.spec.input.incremental:
                remove_superseded(self._directory)
            judge(self._directory, self._job.plan, self._job.spec)
            success = finalise(
                self._directory,
                self._job.plan.units,
                self._job.schema,
                num_skipped_blank=self._job.plan.num_blank,
                max_error_rate=self._job.spec.errors.max_error_rate,
                first_unit=self._job.plan.first_unit(self._job.plan.generation),
            )
        except BaseException as error:
            self._write_end(error)
            raise
        self._write_status(RunState.SUCCEEDED, exit_code=0)
        return _result(
            self._job,
            self._store,
            success.counts,
            self._started_s,
            num_rows_resumed=self._resumed.num_rows,
            num_replicas_lost=self._num_lost,
            num_attempts=self._num_attempts,
            num_rows_again=self._num_rows_again,
        )

    def _run_pending(self) -> None:
        units = self._job.plan.units
        committed = self._directory.committed_units(units)
        self._resumed = self._counts = sum(committed.values(), UnitCounts())
        self._num_resumed_units = self._num_units_committed = len(committed)
        pending = [unit for unit in units if unit.index not in committed]
        logger.info(
            "run %s epoch %d: %d rows in %d units, %d units committed already",
            self._job.record.run8,
            self._epoch.number,
            self._job.plan.num_rows,
            len(units),
            len(committed),
        )
        self._write_status(RunState.RUNNING)
        if pending:
            self._run_on_cluster(pending)

    def _run_on_cluster(self, pending: list[WorkUnit]) -> None:
        # Ray takes seconds to import: only a run that has work pays for it.
        from b2batch.cluster.driver import RunHooks, run_units
        from b2batch.cluster.fleet import RayFleet
        from b2batch.cluster.placement import connect
        from b2batch.cluster.policy import LEAST_CONDEMNED, DispatchPolicy
        from b2batch.worker import make_worker

        spec = self._job.spec
        hooks = RunHooks(
            find_committed=self._find_committed,
            on_progress=self._note_progress,
            on_beat=self._epoch.beat,
            should_stop=self._options.should_stop,
        )
        with connect(spec.cluster) as cluster:
            placement = cluster.place(spec.cluster, spec.model.device, len(pending), self._note_waiting)
            logger.info(
                "%d replicas of %g CPUs and %g GPUs each",
                placement.num_replicas,
                placement.num_cpus,
                placement.num_gpus,
            )
            fleet = RayFleet(
                placement,
                partial(make_worker, self._worker_args()),
                load_bytes=self._load_bytes(on_gpu=placement.num_gpus > 0),
                target=cluster.watch(spec.cluster, placement, len(pending)),
            )
            policy = DispatchPolicy(
                placement.num_replicas,
                spec.cluster.start_timeout_s,
                spec.cluster.step_timeout_s,
                max_condemned=max(
                    LEAST_CONDEMNED,
                    allowed_errors(self._job.plan.num_rows, spec.errors.max_error_rate),
                ),
                min_replicas=spec.cluster.min_replicas,
            )
            totals = run_units(pending, fleet, policy, hooks, drain_grace_s=spec.cluster.drain_grace_s)
        self._num_lost = totals.num_replicas_lost
        self._num_attempts, self._num_rows_again = totals.num_attempts, totals.num_rows_again

    def _load_bytes(self, *, on_gpu: bool) -> int:
        """Host memory that a replica takes while it loads: the weights as read, and as they are to be."""
        checkpoint, model = self._job.checkpoint, self._job.spec.model
        is_wide = model.dtype == "auto" and not on_gpu
        dtype = "float32" if is_wide else gpu_dtype(checkpoint, model)
        return 2 * weight_bytes(Architecture.of(checkpoint.config), dtype, None)

    def _worker_args(self) -> Any:
        from b2batch.worker import WorkerArgs

        return WorkerArgs(
            spec=_with_fixed_model(self._job.spec, self._job.checkpoint),
            files=self._job.plan.files,
            input_schema=self._job.plan.schema,
            output_uri=self._store.uri,
            run_id=self._job.record.run_id,
            epoch=self._epoch.number,
            provenance=self._job.record.provenance,
        )

    def _find_committed(self, unit: WorkUnit) -> UnitCounts | None:
        report = self._directory.find_part(unit)
        return None if report is None else report.counts

    def _note_progress(self, progress: Any) -> None:
        """Take the driver's progress in; tell the caller, and now and then ``status.json``."""
        self._counts = self._resumed + progress.counts
        self._num_units_committed = self._num_resumed_units + progress.num_committed
        self._num_ready, self._num_lost = progress.num_ready, progress.num_lost
        self._num_attempts, self._num_rows_again = progress.num_attempts, progress.num_rows_again
        self._num_out_of_memory = progress.live.num_out_of_memory
        self._num_reused_rows = progress.live.num_reused_rows
        self._options.on_progress(
            JobProgress(
                num_rows=self._job.plan.num_rows,
                num_rows_done=min(self._job.plan.num_rows, self._resumed.num_rows + progress.live.num_rows),
                num_error_rows=self._resumed.num_error + progress.live.num_error_rows,
                num_units=len(self._job.plan.units),
                num_units_committed=self._num_units_committed,
                live=progress.live,
                num_ready=progress.num_ready,
                num_starting=progress.num_starting,
                num_lost=progress.num_lost,
            )
        )
        self._refresh_status()

    def _note_waiting(self) -> None:
        """What a run owes while there is no node for a replica: its lease, its status, and an ear."""
        if self._options.should_stop():
            raise Drained("stopped while it waited for nodes; the same command goes on from here")
        self._epoch.beat()
        self._refresh_status()

    def _refresh_status(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_status_s:
            self._next_status_s = now_s + _STATUS_INTERVAL_S
            self._write_running()

    def _write_running(self) -> None:
        """Tell how far it is. A store that fails ends the run where a part cannot be committed, not here."""
        try:
            self._write_status(RunState.RUNNING)
        except StorageError as error:
            logger.warning("the status could not be written: %s", error)

    def _write_end(self, error: BaseException) -> None:
        """Note how the run ended, unless another driver owns the status by now."""
        if isinstance(error, Fenced):
            return
        exit_code = error.exit_code if isinstance(error, B2BatchError) else self._options.forced_code() or 1
        state = RunState.DRAINED if isinstance(error, Drained) else RunState.FAILED
        if exit_code == 3:
            state = RunState.SUCCEEDED  # every row is accounted for; the code says that too many failed
        try:
            self._write_status(state, exit_code=exit_code, reason=mask_env(str(error))[:2000])
        except (OSError, B2BatchError) as second:
            logger.warning("the status could not be written: %s", second)

    def _write_status(self, state: RunState, *, exit_code: int | None = None, reason: str = "") -> None:
        write_status(
            self._store,
            Status(
                run_id=self._job.record.run_id,
                state=state,
                epoch=self._epoch.number,
                num_units=len(self._job.plan.units),
                num_units_committed=self._num_units_committed,
                counts=self._counts,
                num_replicas=self._num_ready,
                num_replicas_lost=self._num_lost,
                num_rows_again=self._num_rows_again,
                num_out_of_memory=self._num_out_of_memory,
                num_reused_rows=self._num_reused_rows,
                started=self._started,
                updated=_utc_now(),
                num_rows=self._job.plan.num_rows,
                rows_per_s=self._per_s(self._counts.num_rows - self._resumed.num_rows),
                tokens_per_s=self._per_s(
                    self._counts.num_generated_tokens - self._resumed.num_generated_tokens
                ),
                exit_code=exit_code,
                reason=reason,
            ),
        )

    def _per_s(self, number: int) -> float:
        elapsed_s = time.monotonic() - self._started_s
        return round(number / elapsed_s, 3) if elapsed_s else 0.0


def _result(job: PreparedJob, store: Store, counts: UnitCounts, started_s: float, **effort: int) -> JobResult:
    return JobResult(
        output=store.uri,
        run_id=job.record.run_id,
        counts=counts,
        num_skipped_blank=job.plan.num_blank,
        wall_s=time.monotonic() - started_s,
        **effort,
    )


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


def _with_fixed_model(spec: JobSpec, checkpoint: Checkpoint) -> JobSpec:
    """The model that was planned with, wherever and whenever a replica loads it.

    A relative path of a model or an adapter means the driver's directory, not a replica's; a branch of
    a hub's model means the commit that it had when the job began, also on a node that joins later.
    """
    names = {"model": spec.model.model, "adapter": spec.model.adapter}
    paths = {key: Path(name).expanduser() for key, name in names.items() if name is not None}
    fixed = {key: str(path.absolute()) for key, path in paths.items() if path.is_dir()}
    if checkpoint.commit is not None:
        fixed["revision"] = checkpoint.commit
    return spec.model_copy(update={"model": spec.model.model_copy(update=fixed)})


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


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
