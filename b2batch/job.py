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
from functools import partial

from b2batch.cluster.policy import LEAST_CONDEMNED, DispatchPolicy
from b2batch.errors import Drained, NothingToDo, PlanOutdated
from b2batch.labelling.judgement import judge
from b2batch.logbook import JobProgress, Logbook
from b2batch.models.facts import gpu_dtype
from b2batch.models.footprint import Architecture, weight_bytes
from b2batch.notify.announcement import Announcement
from b2batch.outputs.finalise import finalise, remove_superseded
from b2batch.outputs.lease import Epoch
from b2batch.outputs.lock import when_free
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.status import RunState
from b2batch.outputs.store import Store, open_store
from b2batch.outputs.success import Success, allowed_errors
from b2batch.preflight import PreparedJob, prepare_job
from b2batch.rows import UnitCounts, WorkUnit
from b2batch.spec import JobSpec
from b2batch.worker_args import WorkerArgs
from b2batch.worker_start import start_worker, with_fixed_model

logger = logging.getLogger(__name__)

_PLAN_TRIES = 3


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
        run_id, on_progress = job.record.run_id, options.on_progress
        self._log = Logbook(store, run_id, epoch.number, job.plan, started_s, on_progress)

    def drive(self) -> JobResult:
        """Drive the run to its end; ``status.json`` tells how it ended in any case."""
        try:
            self._run_pending()
            self._epoch.check_not_fenced()
            self._log.write(RunState.FINALISING)
            success = self._finalise()
        except BaseException as error:
            self._log.write_end(error, self._options.forced_code)
            raise
        self._log.write(RunState.SUCCEEDED, exit_code=0)
        return _result(
            self._job,
            self._store,
            success.counts,
            self._started_s,
            num_rows_resumed=self._log.resumed.num_rows,
            num_replicas_lost=self._log.status.num_replicas_lost,
            num_attempts=self._log.num_attempts,
            num_rows_again=self._log.status.num_rows_again,
        )

    def _finalise(self) -> Success:
        plan, spec = self._job.plan, self._job.spec
        if spec.input.incremental:
            remove_superseded(self._directory)
        judge(self._directory, plan, spec)
        return finalise(
            self._directory,
            plan.units,
            self._job.schema,
            num_skipped_blank=plan.num_blank,
            max_error_rate=spec.errors.max_error_rate,
            first_unit=plan.first_unit(plan.generation),
        )

    def _run_pending(self) -> None:
        units = self._job.plan.units
        committed = self._directory.committed_units(units)
        self._log.note_committed(committed.values())
        pending = [unit for unit in units if unit.index not in committed]
        logger.info(
            "run %s epoch %d: %d rows in %d units, %d units committed already",
            self._job.record.run8,
            self._epoch.number,
            self._job.plan.num_rows,
            len(units),
            len(committed),
        )
        self._log.write(RunState.RUNNING)
        if pending:
            self._run_on_cluster(pending)

    def _run_on_cluster(self, pending: list[WorkUnit]) -> None:
        # Ray takes seconds to import: only a run that has work pays for it.
        from b2batch.cluster.driver import RunHooks, run_units
        from b2batch.cluster.fleet import RayFleet
        from b2batch.cluster.placement import connect

        spec = self._job.spec
        hooks = RunHooks(
            find_committed=self._find_committed,
            on_progress=self._log.note_progress,
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
                partial(start_worker, self._worker_args()),
                load_bytes=self._load_bytes(on_gpu=placement.num_gpus > 0),
                target=cluster.watch(spec.cluster, placement, len(pending)),
            )
            policy = self._policy(placement.num_replicas)
            run_units(pending, fleet, policy, hooks, drain_grace_s=spec.cluster.drain_grace_s)

    def _policy(self, num_replicas: int) -> DispatchPolicy:
        spec = self._job.spec
        allowed = allowed_errors(self._job.plan.num_rows, spec.errors.max_error_rate)
        return DispatchPolicy(
            num_replicas,
            spec.cluster.start_timeout_s,
            spec.cluster.step_timeout_s,
            max_condemned=max(LEAST_CONDEMNED, allowed),
            min_replicas=spec.cluster.min_replicas,
        )

    def _load_bytes(self, *, on_gpu: bool) -> int:
        """Host memory that a replica takes while it loads: the weights as read, and as they are to be."""
        checkpoint, model = self._job.checkpoint, self._job.spec.model
        is_wide = model.dtype == "auto" and not on_gpu
        dtype = "float32" if is_wide else gpu_dtype(checkpoint, model)
        return 2 * weight_bytes(Architecture.of(checkpoint.config), dtype, None)

    def _worker_args(self) -> WorkerArgs:
        return WorkerArgs(
            spec=with_fixed_model(self._job.spec, self._job.checkpoint),
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

    def _note_waiting(self) -> None:
        """What a run owes while there is no node for a replica: its lease, its status, and an ear."""
        if self._options.should_stop():
            raise Drained("stopped while it waited for nodes; the same command goes on from here")
        self._epoch.beat()
        self._log.refresh()


def _result(job: PreparedJob, store: Store, counts: UnitCounts, started_s: float, **effort: int) -> JobResult:
    return JobResult(
        output=store.uri,
        run_id=job.record.run_id,
        counts=counts,
        num_skipped_blank=job.plan.num_blank,
        wall_s=time.monotonic() - started_s,
        **effort,
    )
